"""``org/name[@revision]`` → a local directory, through huggingface_hub and its cache. Its only user."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from .errors import InputError, ResourceError

_ID = re.compile(r"([\w.-]+/)?[\w.-]+(@[\w./-]+)?")  # without an organisation: gpt2 and others of old
_SMALL = ["*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.md", "*.tiktoken"]
# weights of other tools that lie beside those that are wanted
_FOREIGN = ["onnx/*", "openvino/*", "original/*", "*.onnx", "*.h5", "*.msgpack", "*.gguf", "checkpoint-*/*", "runs/*"]


def is_id(text: str) -> bool:
    """Whether a text has the form of a hub id with its organisation."""
    return "/" in text and bool(_ID.fullmatch(text)) and not text.startswith(".")


def resolve(spec: str | Path, role: Literal["adapter", "base"]) -> Path:
    """The local path that ``spec`` means: itself where it exists, else what is needed of a hub id.

    Honours the cache and ``HF_HUB_OFFLINE``. Raises InputError for what does not exist or is not accessible, and
    ResourceError where the hub cannot be reached and the cache does not have it.
    """
    path = Path(spec)
    if path.exists():
        return path
    text = str(spec)
    if not isinstance(spec, str) or not _ID.fullmatch(text) or text.startswith("."):
        raise InputError(f"{text} does not exist: neither a file or directory here nor a hub id like org/name.")
    name, _, revision = text.partition("@")
    from huggingface_hub import errors, snapshot_download

    weights = ["adapter_model.safetensors", "non_lora_trainables.bin"] if role == "adapter" else ["*.safetensors"]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_SMALL + weights,
                                        ignore_patterns=_FOREIGN))  # fmt: skip
        if not any(p.suffix == ".safetensors" for p in folder.rglob("*")):  # an older repository: pickles
            pickles = ["adapter_model.bin"] if role == "adapter" else ["pytorch_model*.bin"]
            snapshot_download(name, revision=revision or None, allow_patterns=pickles)
        return folder
    except errors.HFValidationError as error:
        raise InputError(f"{text} does not exist, and is no name that a hub repository can have.") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"'{name}' is gated: accept its terms on the hub and log in with 'hf auth login', then try again."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"'{name}' has no revision '{revision}' on the hub.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"'{name}' is neither a path here nor a repository on the hub (or it is private: 'hf auth login')."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"'{text}' is not a path here, not in the local cache, and the hub cannot be asked "
            f"({type(error).__name__}). Go online, unset HF_HUB_OFFLINE, or give a local path."
        ) from error
