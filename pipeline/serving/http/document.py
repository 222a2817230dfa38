"""The OpenAPI document of the server, which `/openapi.json` gives."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipeline.serving.http.access import OPEN_PATHS
from pipeline.serving.request_body import ChatRequest

_REF = "#/components/schemas/"
_ERRORS = {
    400: "The request is wrong, or asks for what this server does not do.",
    401: "The API key is missing or wrong.",
    404: "The path or the model does not exist.",
    405: "The path has another method.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The server does not answer for this host name.",
    429: "The server, or this client, has no room; Retry-After says when to try again.",
    500: "The model or the server failed.",
    503: "The server is stopping.",
}
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_MAYBE_TEXT = {"type": ["string", "null"]}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _schemas() -> dict[str, Any]:
    error = {"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT}
    usage = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
    choice = _object(
        {
            "index": _COUNT,
            "message": _object({"role": {"const": "assistant"}, "content": _TEXT}),
            "finish_reason": {"enum": ["stop", "length"]},
            "logprobs": {"type": ["object", "null"]},
        }
    )
    completion = {
        "id": _TEXT,
        "object": {"const": "chat.completion"},
        "created": _COUNT,
        "model": _TEXT,
        "choices": {"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
        "usage": usage,
    }
    return {
        "Error": _object({"error": _object(error)}),
        "Completion": _object(completion, vico={"type": "object"}),
    }


def _json(name: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _REF + name}}}}


def _responses(statuses: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    return {status: _json("Error", _ERRORS[status]) for status in statuses}


_ALWAYS = (400, 401, 404, 405, 408, 421, 429, 500, 503)
JSON_ROUTE: dict[str, Any] = {
    "response_model": None,
    "responses": {
        200: {"content": {"application/json": {"schema": {"type": "object"}}}},
        **_responses(_ALWAYS),
    },
}
METRICS_ROUTE: dict[str, Any] = {
    "response_model": None,
    "responses": {200: {"content": {"text/plain": {"schema": _TEXT}}}, **_responses(_ALWAYS)},
}
CHAT_ROUTE: dict[str, Any] = {
    "response_model": None,
    "responses": {
        200: {
            "description": "The answer; with `stream`, its chunks as server-sent events.",
            "content": {
                "application/json": {"schema": {"$ref": f"{_REF}Completion"}},
                "text/event-stream": {},  # chunks in the form of OpenAI, and their end
            },
        },
        **_responses((*_ALWAYS, 413, 415)),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"{_REF}ChatRequest"}}},
        }
    },
}


def document(app: FastAPI, name: str, has_keys: bool) -> dict[str, Any]:
    """Return the document of all routes, with the schemas of request, answer and error."""
    if app.openapi_schema is None:
        content = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = ChatRequest.model_json_schema(ref_template=_REF + "{model}")
        parts = schemas.pop("$defs", {})
        components = content.setdefault("components", {})
        schemas["properties"]["model"] = {"const": name}
        components["schemas"] = {**parts, "ChatRequest": schemas, **_schemas()}
        if has_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            content["security"] = [{"key": []}]
        for path in content["paths"].values():  # FastAPI's own validation error never comes from this server
            for operation in path.values():
                operation["responses"].pop("422", None)
                for parameter in operation.get("parameters", ()):  # the only one is the model's name
                    parameter["schema"] = {"const": name}
        for open_path in OPEN_PATHS:
            content["paths"][open_path]["get"]["security"] = []
        app.openapi_schema = content
    return app.openapi_schema
