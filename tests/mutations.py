"""Small changes to a track's content, each at one place: what a slip of the keyboard may make."""

import json
from collections.abc import Iterator

WRONG = {
    "nothing": None,
    "text": "nonsense",
    "empty text": "",
    "true": True,
    "zero": 0,
    "negative": -3,
    "half": 2.5,
    "huge": 10**17,
    "tiny": 1e-9,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "empty list": [],
    "empty mapping": {},
    "list": [1, "a"],
    "mapping": {"a": 1},
}


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything below the top, keys and entries of lists."""
    below = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in below:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutations(content: dict) -> Iterator[tuple[str, tuple, dict]]:
    """(what was done, where, the changed content); the content itself stays as it is."""
    for path in list(places(content)):
        old = _entry(content, path[:-1])[path[-1]]
        for name, value in WRONG.items():
            if value != old or type(value) is not type(old):
                yield name, path, _changed(content, path, value)
        yield "as text", path, _changed(content, path, json.dumps(old))
        yield "in a list", path, _changed(content, path, [old])
        if isinstance(old, list):
            yield "twice", path, _changed(content, path, [*old, *old[:1]])
        yield "deleted", path, _changed(content, path)
        if isinstance(path[-1], str):
            yield "misspelt", path, _renamed(content, path, _slip(path[-1]))


def _slip(key: str) -> str:
    """Two letters changed places, or one too many."""
    swapped = key[:1] + key[2:3] + key[1:2] + key[3:]
    return swapped if swapped != key else f"{key}s"


def _entry(content: object, path: tuple) -> object:
    for key in path:
        content = content[key]
    return content


def _changed(content: dict, path: tuple, value: object = ...) -> dict:
    copy = json.loads(json.dumps(content))
    parent = _entry(copy, path[:-1])
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return copy


def _renamed(content: dict, path: tuple, key: str) -> dict:
    copy = json.loads(json.dumps(content))
    parent = _entry(copy, path[:-1])
    parent[key] = parent.pop(path[-1])
    return copy
