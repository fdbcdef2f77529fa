"""The judge against a real HTTP server on loopback that speaks the OpenAI protocol."""

import asyncio
import base64
import io
import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from trl_apex.rewards import PairwiseReward, RewardScorer, UnifiedReward, VLMJudgeReward
from trl_apex.rewards.registry import load_reward
from trl_apex.rewards.vlm_judge import parse_score, parse_share


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 3.5", 3.5),
        ("**Final Score:** 4", 4),
        ("final score = 2", 2),
        ("The score is 4/5.", 4),
        ("Alignment Score: 2\nCoherence Score: 3\nFinal Score: 5", 5),
        ("Score: `1.25`", 1.25),
        ("最终 Score：４．５", 4.5),
        ("Final Score: 7", None),
        ("Final Score: -1", None),
        ("I give it a 4.", None),
        ("highscore: many", None),
        ("", None),
    ],
)
def test_parse(answer, score):
    assert parse_score(answer, 1, 5) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Alignment Score (1-5): 2\nCoherence Score (1-5): 3\nStyle Score (1-5): 4.6", 3.2),
        ('Word-wise Scores: [["cat", 0.5]]\nAlignment Score (1-5): 2\nStyle Score (1-5): 1', 1.5),
        ("Final Score: 4", 4),
        ("Alignment Score: 2\nStyle Score: 9", None),
        ("", None),
    ],
)
def test_parse_the_mean_of_several(answer, score):
    assert parse_score(answer, 1, 5, mean=True) == (score if score is None else pytest.approx(score))


PUBLISHED = """Alignment Score:
 Image 1: 0.435699999332428
 Image 2: 0.564300000667572

Coherence Score:
 Image 1: 0.4
 Image 2: 0.6

Style Score:
 Image 1: 0.45
 Image 2: 0.55
"""


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (PUBLISHED, (0.435699999332428 + 0.4 + 0.45) / 3),
        ("**Image 1**: 3\n**Image 2**: 1", 0.75),
        ("Image 1: 1\nImage 2: 0\nImage 1: 0.5", None),
        ("Image 2: 0.2\nImage 1: 0.8", None),
        ("Image 1: 0\nImage 2: 0", None),
        ("Image 1 is better", None),
    ],
)
def test_parse_a_pair(answer, share):
    assert parse_share(answer) == (share if share is None else pytest.approx(share))


class Judge(BaseHTTPRequestHandler):
    """Scores by the red channel of the images' corners; the prompt may ask it to misbehave."""

    protocol_version = "HTTP/1.1"
    seen: list[dict] = []
    busy: list[int] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        reds = []
        for part in content[:-1]:
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            reds.append(Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))[0])
        text = content[-1]["text"]
        self.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        if "mumble" in text:
            return self.answer(200, "I cannot say.")
        if "forbidden" in text:
            return self.answer(403, "")
        if "busy" in text and len(self.busy) < 2:
            self.busy.append(1)
            return self.answer(503, "")
        if len(reds) == 2:
            return self.answer(200, "\n".join(f"Image {i}: {red / sum(reds)}" for i, red in enumerate(reds, 1)))
        if "Style Score (1-5): Z" in text:
            return self.answer(
                200, "".join(f"{aspect} Score (1-5): {reds[0] / 50 + i}\n" for i, aspect in enumerate("ACS"))
            )
        return self.answer(200, f"Looks fine.\nFinal Score: {reds[0] / 50}")

    def answer(self, status, text):
        payload = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def pictures(*reds):
    return [Image.new("RGB", (8, 8), (red, 0, 0)) for red in reds]


def test_scores(url, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret\n")  # a newline, as files end with one, is left out
    Judge.seen.clear()
    judge = VLMJudgeReward(url, "unified", api_key_env="JUDGE_KEY")
    assert b"s3cret" not in pickle.dumps(judge)
    rewards = asyncio.run(judge(prompts=["a {brace}", "b", "c"], completions=pictures(50, 125, 250)))
    assert rewards == [1.0, 2.5, 5.0] and rewards.errors == [None] * 3
    call = next(call for call in Judge.seen if "a {brace}" in call["messages"][0]["content"][1]["text"])
    assert call["path"] == "/v1/chat/completions" and call["key"] == "Bearer s3cret"
    assert call["model"] == "unified" and call["temperature"] == 0


def test_unified_reward_scores_an_image_and_judges_a_pair(url):
    judge = load_reward(f'unified_reward(url="{url}", model="unified")')
    assert isinstance(judge, UnifiedReward)
    rewards = asyncio.run(judge(prompts=["a cat", "a dog"], completions=pictures(50, 100)))
    assert rewards == [2.0, 3.0], "the mean of r, r + 1, r + 2"
    columns = {"first": ["x", "y"], "second": ["x", "y"]}  # of a dataset
    assert asyncio.run(judge(["a cat", "a dog"], pictures(50, 100), **columns)) == [2.0, 3.0]
    wins = PairwiseReward(judge)
    assert wins.__name__ == "wins_by_unified_reward"
    # Shares of 50 against 150 and 200, of 150 against 50 and 200, of 200 against 50 and 150.
    expected = [(1 / 4 + 1 / 5) / 2, (3 / 4 + 3 / 7) / 2, (4 / 5 + 4 / 7) / 2]
    assert wins(["a cat"] * 3, pictures(50, 150, 200)) == pytest.approx(expected)
    assert wins(["a cat", "a cat"], pictures(50, 50)) == [0.5, 0.5]


def test_a_pair_without_an_answer_has_a_cause(url):
    rewards = PairwiseReward(VLMJudgeReward(url, "unified"))(["mumble", "mumble"], pictures(50, 150))
    assert rewards == [None, None] and "no shares of the two images: 'I cannot say.'" in rewards.errors[0]


def test_an_image_is_judged_once_for_a_prompt(url):
    Judge.seen.clear()
    judge = VLMJudgeReward(url, "unified")
    for _ in range(2):
        assert asyncio.run(judge(prompts=["a", "b"], completions=pictures(100, 100))) == [2.0, 2.0]
    assert asyncio.run(judge(prompts=["a"], completions=pictures(150))) == [3.0]
    assert len(Judge.seen) == 3
    for _ in range(2):  # a failure is asked again
        assert asyncio.run(judge(prompts=["mumble"], completions=pictures(100))) == [None]
    assert len(Judge.seen) == 5


def test_one_bad_answer_costs_one_reward(url):
    judge = VLMJudgeReward(url, "unified", backoff=0.01)
    prompts = ["fine", "mumble", "forbidden", "busy"]
    with RewardScorer([judge]) as scorer, pytest.warns(UserWarning, match="failed on 2 of 4"):
        scored = scorer.submit(prompts=prompts, completions=pictures(100, 100, 100, 100)).result(timeout=20)
    assert scored.rewards[:, 0].nan_to_num(-1).tolist() == [2.0, -1.0, -1.0, 2.0]
    assert scored.failures == {"vlm_judge": 2}


def test_nobody_there_fails_the_batch():
    judge = VLMJudgeReward("http://127.0.0.1:9", "unified", max_retries=1, backoff=0.01)
    with RewardScorer([judge]) as scorer, pytest.warns(UserWarning, match="no image could be judged"):
        scored = scorer.submit(prompts=["x"], completions=pictures(1)).result(timeout=20)
    assert scored.failures == {"vlm_judge": 1}


def test_options():
    with pytest.raises(ValueError, match="`low` must be below"):
        VLMJudgeReward("http://x", "m", low=5, high=1)
    for instruction in ('answer {"score": 1 to 5}', "{0}", "a { brace"):
        with pytest.raises(ValueError, match="Double the braces"):
            VLMJudgeReward("http://x", "m", instruction=instruction)
        with pytest.raises(ValueError, match="`pair_instruction` must have no fields"):
            VLMJudgeReward("http://x", "m", pair_instruction=instruction)
    VLMJudgeReward("http://x", "m", instruction='{prompt} {{"score": 1 to 5}}')


def test_a_key_that_cannot_be_sent_is_refused_without_its_value(url, monkeypatch):
    judge = VLMJudgeReward(url, "unified", api_key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "my-own-key\n0123456789")
    with RewardScorer([judge]) as scorer, pytest.warns(UserWarning, match="JUDGE_KEY must be printable") as caught:
        assert scorer.submit(prompts=["x"], completions=pictures(1)).result(timeout=20).failures == {"vlm_judge": 1}
    assert not any("0123456789" in str(warning.message) for warning in caught)
