"""The SLURM script, with stand-ins for SLURM's own commands that start each node as processes of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare import curve
from engines import CONFIGS
from processes import launch

HERE = Path(__file__).parent
SCRIPT = CONFIGS.parent / "slurm.sh"
COMMANDS = {
    # Writes one node after the other, as it may: a reader must not leave after the first.
    "scontrol": """
if [ "$1" = show ]; then for node in ${3//,/ }; do echo $node; sleep 0.02; done; else echo "$@" > "$FAKE/scontrol"; fi
""",
    # One task a node; the first that fails ends the others, as --kill-on-bad-exit has it.
    "srun": """
echo "$1 $2" > "$FAKE/srun"; shift 2
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
for node in $(seq $SLURM_NNODES); do wait -n || { code=$?; kill $(jobs -p); exit $code; }; done
""",
}
RECORD = 'for a in "$@"; do echo "$a"; done > "$FAKE/node$SLURM_NODEID"; echo "$OMP_NUM_THREADS" > "$FAKE/threads"; '


def slurm(folder: Path, commands: dict[str, str], **variables: str) -> dict[str, str]:
    """The environment of a job."""
    (folder / "bin").mkdir()
    for name, text in commands.items():
        (folder / "bin" / name).write_text("#!/bin/bash\n" + text)
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "4"}
    return {**os.environ, **job, "SLURM_CPUS_PER_TASK": "32", "PATH": path, "FAKE": str(folder), **variables}


def flags(folder: Path, node: int) -> tuple[dict[str, str], list[str]]:
    """What `accelerate` was called with on a node: its own flags, and the script with its arguments."""
    first, *words = (folder / f"node{node}").read_text().splitlines()
    assert first == "launch"
    ours = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return dict(zip(words[:ours:2], words[1:ours:2], strict=True)), words[ours:]


def submit(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    env = slurm(folder, {**COMMANDS, "accelerate": RECORD}, **variables)
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


def test_one_node(tmp_path):
    assert submit(tmp_path, "zero2.yaml", "train.py", "--a", "b c").returncode == 0
    given, script = flags(tmp_path, 0)
    assert given == {
        "--config_file": "zero2.yaml", "--num_machines": "1", "--num_processes": "4", "--machine_rank": "0",
        "--main_process_ip": "localhost", "--main_process_port": "21234",
    }  # fmt: skip
    assert script == ["train.py", "--a", "b c"]
    assert (tmp_path / "threads").read_text() == "8\n"
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1 --ntasks-per-node=1\n"


def test_two_nodes_and_a_restart(tmp_path):
    nodes = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "first,second", "SLURM_RESTART_COUNT": "1"}
    assert submit(tmp_path, "zero2.yaml", "train.py", "--a", "b", **nodes).returncode == 0
    for node in (0, 1):
        given, script = flags(tmp_path, node)
        assert (given["--machine_rank"], given["--num_machines"], given["--num_processes"]) == (str(node), "2", "8")
        assert given["--main_process_ip"] == "first"
        assert script == ["train.py", "--a", "b", "--resume_from_checkpoint", "true"]


def test_a_node_that_fails_fails_the_job(tmp_path):
    env = slurm(tmp_path, {**COMMANDS, "accelerate": "exit $((3 * SLURM_NODEID))"}, SLURM_NNODES="2")
    assert subprocess.run(["bash", str(SCRIPT), "zero2.yaml", "train.py"], env=env).returncode == 3


def test_the_warning_puts_the_job_back_into_the_queue(tmp_path):
    env = slurm(tmp_path, {**COMMANDS, "accelerate": 'touch "$FAKE/started"; sleep 600 & wait'})
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "zero2.yaml", "train.py"], env=env, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        process.wait()
        assert (tmp_path / "scontrol").read_text() == "requeue 41234\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_without_arguments_it_says_what_it_needs(tmp_path):
    done = submit(tmp_path, "zero2.yaml")
    assert done.returncode == 2 and "usage: sbatch" in done.stderr


@pytest.mark.distributed
def test_two_nodes_train(tmp_path):
    """Two launchers that meet at the first node's address, a process each, as on two machines."""
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "ACCELERATE_USE_CPU": "true", "ENGINE": "ddp"}
    variables |= {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": str(os.getpid())}
    env = slurm(tmp_path, COMMANDS, **variables)
    script = [str(HERE / "launched.py"), str(tmp_path), "never"]
    done = launch(["bash", str(SCRIPT), str(CONFIGS / "two_node_ddp.yaml"), *script], env)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "rank0.json").read_text())
    assert (result["world"], result["engine"], result["step"]) == (2, "ddp", 2)
    assert curve(result, "ratio/max_deviation")[0] < 1e-6
