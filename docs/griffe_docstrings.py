"""Makes the docstrings of the package, which follow Hugging Face's form, readable by mkdocstrings."""

import dataclasses
import importlib
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

    def on_class_members(self, *, cls, **kwargs) -> None:
        """The help text of a configuration's field is its documentation."""
        if not any(str(member.value).startswith(("_field(", "_option(")) for member in cls.attributes.values()):
            return
        owner = getattr(importlib.import_module(cls.module.path), cls.name)
        for field in dataclasses.fields(owner):
            if field.name in cls.attributes and "help" in field.metadata:
                member = cls.attributes[field.name]
                member.docstring = griffe.Docstring(field.metadata["help"], parent=member)
