"""Makes the docstrings of the package, which follow Hugging Face's form, readable by mkdocstrings."""

import re

import griffe


class HuggingFaceDocstrings(griffe.Extension):
    """`Example:` becomes a section of code, and [`Name`] a plain name."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            text = re.sub(r"^(\s*)Example:\s*$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\[(`[\w.]+`)\](?![\[(])", r"\1", text)
