"""What a server warns of at its start."""

from dataclasses import replace

import pytest

from cluster.site import Site
from pipeline.serving.http.access import Access
from pipeline.serving.server import warnings
from pipeline.serving.start.settings import ReplicaOptions, ServerSettings
from tests.integration.test_serve import LIMITS

LOCAL = ServerSettings("127.0.0.1", 0, "cpu", "float32")
KEYED = replace(LOCAL, access=Access((b"key",)))


def replicated(number: int) -> ServerSettings:
    return replace(LOCAL, replicas=ReplicaOptions(number, Site()))


@pytest.mark.parametrize(
    "host, settings, words",
    [
        ("127.0.0.1", LOCAL, []),
        ("::1", LOCAL, []),
        ("0.0.0.0", LOCAL, ["no key is required"]),
        ("::", LOCAL, ["no key is required"]),
        ("0.0.0.0", KEYED, []),
        ("127.0.0.1", replicated(1), []),
        ("127.0.0.1", replicated(4), []),
        ("127.0.0.1", replicated(5), ["--max-requests=64 of all clients is below the 80 answers"]),
    ],
)
def test_what_is_rarely_meant_is_said(host, settings, words):
    got = list(warnings(host, settings, replace(LIMITS, waiting=64, batch=16)))
    assert len(got) == len(words) and all(word in line for word, line in zip(words, got, strict=True))
