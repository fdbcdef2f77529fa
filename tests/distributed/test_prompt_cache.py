"""Several processes share the work of encoding the prompts, and one folder of embeddings."""

from caching import train_and_count
from engines import environment
from processes import run
from training import PROMPTS


def test_each_process_encodes_its_share(tmp_path):
    def start(cache_dir):
        return run(train_and_count, 2, environment("ddp", 2), output_dir=str(tmp_path / "run"), cache_dir=cache_dir)

    first, second = start(str(tmp_path / "cache"))
    assert first["world"] == second["world"] == 2
    assert sorted(first["before"] + second["before"]) == sorted(set(PROMPTS))
    assert first["before"] and second["before"] and first["later"] == second["later"] == []
    again = start(str(tmp_path / "cache"))
    assert [rank["before"] + rank["later"] for rank in again] == [[], []]
    assert again[0]["weights"] == first["weights"]
