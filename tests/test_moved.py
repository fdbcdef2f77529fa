"""Old import paths work for one release and say where things are now."""

import importlib
import sys

import pytest

from trl_apex._moved import MOVED

PACKAGES = {"trl_apex.hub": "push_run", "trl_apex.loss": "gaussian_kl"}  # with names of their own


@pytest.mark.parametrize("old", sorted(MOVED.keys() - PACKAGES))
def test_an_old_path_gives_the_new_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"`{old}` has moved to `{MOVED[old]}`") as caught:
        exec(compile(f"import {old}", "a_script.py", "exec"))
    module = sys.modules[old]
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == MOVED[old]
    assert [warning.filename for warning in caught] == ["a_script.py"]
    importlib.import_module(old)  # told once


@pytest.mark.parametrize("old, name", PACKAGES.items())
def test_a_name_of_an_old_package_comes_from_the_new_module(old, name):
    names = {}
    with pytest.warns(FutureWarning, match=f"`{old}` has moved to `{MOVED[old]}`") as caught:
        exec(compile(f"from {old} import {name}", "a_script.py", "exec"), names)
    assert names[name] is getattr(importlib.import_module(MOVED[old]), name)
    assert {warning.filename for warning in caught} == {"a_script.py"}


def test_other_missing_modules_stay_missing():
    with pytest.raises(ModuleNotFoundError, match="trl_apex.rewards.nothing"):
        importlib.import_module("trl_apex.rewards.nothing")
