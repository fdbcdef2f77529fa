"""Makes the docstrings of the package, which follow Hugging Face's form, readable by mkdocstrings."""

import ast
import re

import griffe

ARGUMENT = re.compile(r"^( +[\w*][\w*, ]* )\((.*)\):", re.MULTILINE)


class HuggingFaceDocstrings(griffe.Extension):
    """`Example:` becomes a section of code, [`Name`] a plain name, and the types of arguments lose their marks."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            text = re.sub(r"^(\s*)Example:\s*$", r"\1Examples:", text, flags=re.MULTILINE)
            text = re.sub(r"\[(`[\w.]+`)\](?![\[(])", r"\1", text)
            obj.docstring.value = ARGUMENT.sub(lambda m: f"{m[1]}({re.sub('[`*]', '', m[2])}):", text)

    def on_attribute(self, *, attr, **kwargs) -> None:
        """The help text of a configuration's field is its documentation."""
        if attr.docstring is not None or attr.value is None:
            return
        try:
            value = ast.parse(str(attr.value), mode="eval").body
        except SyntaxError:
            return
        for call in ast.walk(value):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("_help", "_option"):
                text = call.args[-1]
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    attr.docstring = griffe.Docstring(text.value, parent=attr)
