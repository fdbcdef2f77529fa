"""Four prompts of the tiny world and two rewards that need no network."""

PROMPTS = [
    'a red circle with " C A T "',
    'a blue square with " H U T "',
    'a green star with " T E N "',
    'a red square with " L O T "',
]


def redness(completions, images, **kwargs):
    return images[:, 0].mean((1, 2)).tolist()


def contrast(prompts, completions, images, **kwargs):
    return (100 * images.std((1, 2, 3))).tolist()
