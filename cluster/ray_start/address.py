"""Ask, within a time limit, whether a Ray cluster answers at an address: `ray.init` would try forever."""

from __future__ import annotations

import grpc
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from vico.errors import UserError

_ANSWER_TIMEOUT_S = 15.0


def refuse_no_cluster(source: str, address: str) -> None:
    """Raise UserError unless a cluster's GCS, the address that `ray start --head` names, answers there.

    `source` is the setting with the address. `auto` passes if no cluster runs here; `ray.init` then
    reports that.
    """
    _refuse_malformed(source, address)
    canonical = canonicalize_bootstrap_address(address)
    if canonical is None:
        return
    channel = create_gcs_channel(canonical)
    try:
        NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=_ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:  # `ray.init` would warn once a second for 20 s
            raise refused_token(source, address) from error
        reason = _reason(error.code(), error.details() or "")
        raise UserError(
            f"{source}={address}: no Ray cluster answers there ({reason}); give HOST:PORT of `ray start "
            "--head` (usually port 6379, not the port of the dashboard or of a client server), or unset "
            f"{source} to use a local Ray"
        ) from error
    finally:
        channel.close()


def refused_token(source: str, address: str) -> UserError:
    """Return the error of a cluster that wants another token than ours, or any."""
    return UserError(
        f"{source}={address}: the cluster refuses our token; give its token in RAY_AUTH_TOKEN or in "
        "~/.ray/auth_token, with RAY_AUTH_MODE=token"
    )


def _refuse_malformed(source: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    if address != "auto" and ("://" in address or not host or not is_port):
        raise UserError(
            f"{source}={address} is not the address of a cluster (HOST:PORT, or auto); unset {source} to use "
            "a local Ray, or name a Ray Jobs server in jobs.address for `vico submit`"
        )


def _reason(code: grpc.StatusCode, details: str) -> str:
    """Return why an answer is not that of a GCS."""
    if "DNS resolution failed" in details:
        return "the name of the host does not resolve"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {_ANSWER_TIMEOUT_S:g} s"
    if code == grpc.StatusCode.UNAVAILABLE:
        return "nothing listens there, or another server"
    return "another server does"
