"""Old import paths work for one release and say where things are now."""

import importlib
import sys

import pytest

from trl_apex._moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_gives_the_new_module(old):
    with pytest.warns(FutureWarning, match=f"`{old}` has moved to `{MOVED[old]}`") as caught:
        exec(compile(f"import {old}", "a_script.py", "exec"))
    module = sys.modules[old]
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == MOVED[old]
    assert [warning.filename for warning in caught] == ["a_script.py"]
    importlib.import_module(old)  # told once


def test_other_missing_modules_stay_missing():
    with pytest.raises(ModuleNotFoundError, match="trl_apex.rewards.nothing"):
        importlib.import_module("trl_apex.rewards.nothing")
