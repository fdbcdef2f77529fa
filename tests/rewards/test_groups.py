"""Rewards that compare the images of a group, worked out by hand."""

import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import history, redness, tiny_trainer

from trl_apex.rewards import PairwiseReward, RankReward, Reward, RewardList, RewardLoadError, RewardScorer
from trl_apex.rewards.registry import load_reward

PROMPTS = ["a", "a", "a", "a", "b", "b"]
GREY = [0.1, 0.5, 0.5, 0.9, 0.4, 0.2]
IMAGES = torch.tensor(GREY).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
RANKS = [0.0, 0.5, 0.5, 1.0, 1.0, 0.0]


def brightness(prompts, completions, **kwargs):
    return [float(np.asarray(image).mean()) for image in completions]


async def brightness_later(prompts, completions, **kwargs):
    return brightness(prompts, completions)


def of_images(prompts, completions, images, completion_ids):
    """Takes the keywords of every call, and no others."""
    return images.mean((1, 2, 3))


def brighter(prompts, first, second, **columns):
    a, b = brightness(prompts, first), brightness(prompts, second)
    return [0.5 if x == y else float(x > y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("reward", [brightness, brightness_later, of_images])
def test_ranks_by_hand(reward):
    ranked = RankReward(reward)
    assert ranked.__name__ == f"rank_of_{reward.__name__}"
    assert ranked(PROMPTS, images=IMAGES) == RANKS
    assert ranked(["p"] * 6, images=IMAGES, group_ids=[7, 7, 7, 7, 8, 8]) == RANKS
    assert ranked(["p"] * 4, images=IMAGES[:4], group_ids=[1, 2, 3, 4]) == [None] * 4, "alone in its group"


def test_missing_scores_have_no_rank_and_their_cause_is_kept():
    def some(prompts, **kwargs):
        return RewardList([1.0, None, 3.0, 2.0], [None, "truncated", None, None])

    found = RankReward(some)(["a"] * 4, images=IMAGES[:4])
    assert found == [0.0, None, 1.0, 0.5] and found.errors == [None, "truncated", None, None]
    assert RankReward(lambda prompts, **kwargs: [1.0, None])(["a"] * 2, images=IMAGES[:2]) == [None, None]


def test_a_reward_by_name_and_pickled():
    ranked = load_reward('rank(reward="jpeg_compressibility", name="small")')
    assert ranked.__name__ == "small"
    pictures = [Image.effect_noise((16, 16), sigma).convert("RGB") for sigma in (0, 50)]
    assert ranked(["a"] * 2, pictures) == [1.0, 0.0] == pickle.loads(pickle.dumps(ranked))(["a"] * 2, pictures)


def test_win_rates_by_hand():
    wins = PairwiseReward(brighter)
    assert wins.__name__ == "wins_by_brighter"
    assert wins(PROMPTS, images=IMAGES) == RANKS


def test_a_judge_who_prefers_the_first_place_gains_nobody_anything():
    assert (
        PairwiseReward(lambda first, **kwargs: [1.0] * len(first), name="first")(PROMPTS, images=IMAGES) == [0.5] * 6
    )


def test_a_judge_gets_each_pair_in_both_orders_with_its_columns():
    seen = []

    async def judge(prompts, first, second, target):
        seen.extend(zip(prompts, target, brightness(prompts, first), brightness(prompts, second), strict=True))
        return [None] * len(first)

    assert PairwiseReward(judge)(["a", "a"], images=IMAGES[[0, 3]], target=["x", "x"], group_ids=[0, 0]) == [None] * 2
    low, high = brightness([], [Image.new("RGB", (1, 1), (grey,) * 3) for grey in (26, 230)])
    assert seen == [("a", "x", low, high), ("a", "x", high, low)]


@pytest.mark.parametrize("answer, message", [(2.0, "must return probabilities.*Found 2"), ("yes", "numbers or None")])
def test_a_judge_that_answers_something_else_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        PairwiseReward(lambda first, **kwargs: [answer] * len(first), name="odd")(PROMPTS, images=IMAGES)


def test_weights_of_the_reward_inside_are_checked_before_training():
    ranked = RankReward('pickscore(model="no/such/folder/of/mine")')
    with pytest.raises(RewardLoadError, match="pickscore"), RewardScorer([ranked]) as scorer:
        scorer.check()


def test_a_reward_alone_and_inside_another_may_load_at_the_same_time():
    inside_holds_its_lock, other_loads = threading.Event(), threading.Event()

    class Slow(Reward):
        def load(self):
            with self._lock:
                inside_holds_its_lock.set()
                other_loads.wait(1)
                return super().load()

        def _score(self, loaded, images, prompts, columns):
            return images.mean((1, 2, 3)).tolist()

    class Watched(RankReward):
        def load(self):
            inside_holds_its_lock.wait()
            other_loads.set()
            return super().load()

    slow = Slow("slow", device="cpu")
    with RewardScorer([slow, Watched(slow)]) as scorer:
        rewards = scorer.submit(prompts=PROMPTS, completions=[], images=IMAGES, group_ids=[0, 0, 0, 0, 1, 1])
        assert rewards.result(timeout=60).rewards[:, 1].tolist() == RANKS


def test_the_scorer_gives_groups_to_those_that_want_them():
    pictures = [Image.new("RGB", (2, 2), (grey,) * 3) for grey in range(6)]
    with RewardScorer([brightness, RankReward(brightness)]) as scorer:
        grouped = scorer.submit(prompts=PROMPTS, completions=pictures, group_ids=[0, 0, 0, 1, 1, 1]).result().rewards
        alone = scorer.submit(prompts=PROMPTS, completions=pictures).result().rewards
    assert grouped[:, 0].tolist() == alone[:, 0].tolist() == list(range(6))
    assert grouped[:, 1].tolist() == [0.0, 0.5, 1.0] * 2 and alone[:, 1].isnan().all()


@pytest.mark.parametrize("overlap", [True, False])
def test_training_gives_whole_groups_also_where_the_rollout_splits_them(tmp_path, overlap):
    seen = []

    def spread(prompts, images, group_ids, **kwargs):
        seen.append((group_ids, len(images), float(images.max()) <= 1))
        return [0.0, 1.0, None, None] if len(seen) == 1 else [0.0, 1.0, 2.0, 3.0]

    spread.whole_groups = True
    trainer = tiny_trainer(
        tmp_path, [redness, spread, RankReward(redness)], max_steps=2, rollout_batch_size=1, reward_overlap=overlap
    )
    trainer.train()
    assert seen == [([0, 0, 1, 1], 4, True)] * 2
    assert history(trainer, "rewards/spread/images") == [2, 4] and history(trainer, "rewards/spread/prompts") == [1, 2]
    assert history(trainer, "rewards/rank_of_redness/mean") == [0.5, 0.5]
    assert history(trainer, "rewards/redness/images") == [4, 4]


def test_an_evaluation_has_no_groups_and_says_so(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, [redness, RankReward(redness)], evaluate=True)
    metrics = trainer.evaluate()
    assert "eval_rewards/redness/mean" in metrics and "eval_rewards/rank_of_redness/mean" not in metrics
    assert "'rank_of_redness' scored none of the 4 images" in caplog.text
