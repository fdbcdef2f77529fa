"""Requests that schemathesis makes up from the OpenAPI document."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from loopback import running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from trl_apex.rewards import JPEGCompressibilityReward
from trl_apex.rewards.server import build_app

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
TOKEN = "a-token-of-some-length"
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
