"""Requests that schemathesis makes up from the OpenAPI document."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from loopback import TOKEN, running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from trl_apex.rewards import JPEGCompressibilityReward
from trl_apex.serving.server import Header, build_app
from trl_apex.serving.wire import MEDIA_TYPE

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=5
)


@st.composite
def bodies(draw):
    """Requests with a few small images, half of them with something that does not fit."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
    header = {"prompts": [draw(st.text(max_size=5)) for _ in sizes], "sizes": sizes}
    pixels = bytes(sum(3 * height * width for height, width in sizes))
    wrong = draw(st.sampled_from(["nothing", "nothing", "nothing", "header", "line", "pixels"]))
    if wrong == "header":
        header[draw(st.sampled_from(sorted(Header.model_fields)))] = draw(JSON)
    line = draw(st.binary(max_size=20)) if wrong == "line" else json.dumps(header).encode()
    return line + b"\n" + (draw(st.binary(max_size=20)) if wrong == "pixels" else pixels)


schemathesis.openapi.media_type(MEDIA_TYPE, bodies())
schema = schemathesis.openapi.from_dict(build_app([JPEGCompressibilityReward()]).openapi())


@pytest.fixture(scope="module")
def url():
    with running([JPEGCompressibilityReward()], token=TOKEN) as url:
        yield url


def quickly(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def check(case, url):
    if "name" in case.path_parameters and hash(case.path_parameters["name"]) % 4:
        case.path_parameters["name"] = "jpeg_compressibility"  # else almost every request ends at 404
    response = case.call(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"})
    case.validate_response(response, checks=CHECKS)


@schema.parametrize()
@quickly(12)
def test_made_up_requests(case, url):
    check(case, url)


@pytest.mark.slow
@schema.parametrize()
@quickly(500)
def test_many_made_up_requests(case, url):
    check(case, url)
