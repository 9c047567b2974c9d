"""Signed texts: a C2PA manifest that says which model made a text, when, and that a machine did.

The manifest is inside the text, in variation selectors that nobody sees, or in a file beside it. It covers the text in
Unicode's form C, as C2PA's rule for text has it. c2pa-rs makes and checks manifests, c2pa-text the wrapper.
"""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama2 import files
from llama2.errors import SafetyError
from llama2.safety import signing
from llama2.version import package_version

#: IPTC's words for "made by a trained model".
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
#: Our assertion: model, weights, watermark.
LABEL = "llama2.generation"
_FORMAT = "text/plain"
_MISSING = "signed texts need more libraries; `pip install 'whole-llama[safeguard]'` brings them"
#: Bytes by which a manifest may grow between the two times that it is made.
_SPARE = 64
#: What c2pa-rs says of every wrapper in a text, whose place it does not know. We compare the place ourselves.
_PLACE = "exclusion does not match"


@dataclass(frozen=True, slots=True)
class Generation:
    """What a manifest says of a text."""

    model: str
    weights: str  # sha256 of the weights' files
    watermark: str | None  # the scheme
    time: str  # when it was signed, by the signer's clock
    signer: str = ""  # of the certificate


def weights_digest(path: Path) -> str:
    """`sha256:` and the digest of a model's file; of a folder, that of its files' names and digests, but signatures."""
    if path.is_file():
        return f"sha256:{files.sha256(path, error=SafetyError)}"
    lines = [
        f"{files.sha256(file, error=SafetyError)}  {file.relative_to(path).as_posix()}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != signing.SIGNATURE
    ]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def describe(model: str, weights: Path, watermark: str | None) -> Generation:
    """What to say of a text that a model has just written."""
    return Generation(model, weights_digest(weights), watermark, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")


def embed(text: str, said: Generation, key: Path, chain: Path) -> str:
    """The text in form C with its signed manifest behind it. Raises SafetyError."""
    c2pa_text = _libraries()[1]
    clean = unicodedata.normalize("NFC", text)
    if c2pa_text.find_wrapper_info(clean):
        raise SafetyError("the text has a manifest already; sign the text without it")
    data = clean.encode()
    size = c2pa_text.worst_case_wrapper_byte_length(len(_make(data, said, key, chain, 1 << 20)) + _SPARE)
    manifest = _make(data, said, key, chain, size)
    return clean + str(c2pa_text.encode_wrapper_padded(manifest, size))


def beside(text: str, said: Generation, key: Path, chain: Path) -> bytes:
    """The signed manifest of a text, for a file beside it. Raises SafetyError."""
    return _make(unicodedata.normalize("NFC", text).encode(), said, key, chain, 0)


def check(text: str, chain: Path, manifest: bytes | None = None) -> Generation:
    """What the manifest of a text says, if it was signed by the owner of a certificate and nothing changed since.

    Without `manifest`, it is inside the text, at its end but for a line end. Raises SafetyError, in one line, for
    a text without one, or that is not the signed one. Raises it for a signature by somebody else, and for a certificate
    that is not valid now.
    """
    c2pa, c2pa_text = _libraries()
    signing.certificates(chain)
    clean = unicodedata.normalize("NFC", text)
    place: tuple[int, int] | None = None
    if manifest is None:
        clean = clean.rstrip("\r\n")  # a line end behind the manifest is a program's, and not the text's
        try:
            found = c2pa_text.find_wrapper_info(clean)
        except ValueError:
            raise SafetyError("the text has several manifests; a signed text has one") from None
        if not found:
            raise SafetyError(
                "the text has no manifest: it was never signed, or was stripped of it; nothing says who wrote it"
            )
        manifest, *where = found
        place = where[0], where[1]
    report = _read(c2pa, clean.encode(), bytes(manifest or b""), chain)
    return _judged(report, place)


def _judged(report: dict[str, Any], place: tuple[int, int] | None) -> Generation:
    """What c2pa-rs found of a manifest, as what it says. Raises SafetyError where the text or the signer is another."""
    results = report.get("validation_results", {}).get("activeManifest", {})
    passed = {each["code"] for each in results.get("success", ())}
    failed = [each for each in results.get("failure", ()) if _PLACE not in each.get("explanation", "")]
    store = report["manifests"][report["active_manifest"]]["assertion_store"]
    excluded = [(each["start"], each["length"]) for each in store.get("c2pa.hash.data", {}).get("exclusions") or ()]
    codes = [each["code"] for each in failed]
    if "signingCredential.trusted" not in passed:
        reason = ", ".join(codes) or "unknown"
        raise SafetyError(f"the manifest is not signed by the owner of this certificate ({reason})")
    if "assertion.dataHash.match" not in passed or excluded != ([place] if place else []):
        raise SafetyError("the text is not the one that was signed: something in it was changed, added or left out")
    if codes or "claimSignature.validated" not in passed:
        raise SafetyError(f"the manifest does not hold: {', '.join(codes) or 'its signature was not checked'}")
    said, actions = store.get(LABEL), store.get("c2pa.actions.v2", {}).get("actions", ())
    if not isinstance(said, Mapping) or not any(each.get("digitalSourceType") == SOURCE for each in actions):
        raise SafetyError("the manifest does not say that a model wrote the text; another program made it")
    watermark = said.get("watermark")
    return Generation(
        model=str(said.get("model")),
        weights=str(said.get("weights")),
        watermark=None if watermark is None else str(watermark),
        time=str(said.get("time")),
        signer=report["signer"],
    )


def _read(c2pa: Any, data: bytes, manifest: bytes, chain: Path) -> dict[str, Any]:
    """c2pa-rs' whole report on a text with the certificate's issuer as the only one that is trusted."""
    anchors = "".join(_pem(each) for each in signing.certificates(chain)[1:] or signing.certificates(chain))
    usage = "1.3.6.1.5.5.7.3.4"  # e-mail protection, C2PA's default for those who sign
    settings = {"trust": {"user_anchors": anchors, "trust_config": usage}, "verify": {"verify_trust": True}}
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(settings))
        with c2pa.Reader(_FORMAT, io.BytesIO(data), manifest, context=context) as reader:
            report, plain = json.loads(reader.detailed_json()), json.loads(reader.json())
    except c2pa.C2paError as error:
        raise SafetyError(f"the manifest cannot be read: {' '.join(str(error).split())[:200]}") from None
    signer = plain["manifests"][plain["active_manifest"]].get("signature_info", {}).get("common_name", "")
    return {**report, "signer": signer, "validation_results": plain.get("validation_results", {})}


def _pem(certificate: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    return str(certificate.public_bytes(serialization.Encoding.PEM).decode())


def _make(data: bytes, said: Generation, key: Path, chain: Path, wrapper: int) -> bytes:
    """A manifest for a text's bytes, behind which comes a wrapper of so many bytes; 0: there is none."""
    c2pa, _ = _libraries()
    exclusions = {"exclusions": [{"start": len(data), "length": wrapper}]} if wrapper else {}
    digest = list(hashlib.sha256(data).digest())
    action = {
        "action": "c2pa.created",
        "when": said.time,
        "softwareAgent": {"name": said.model},
        "digitalSourceType": SOURCE,
    }
    about = {"model": said.model, "weights": said.weights, "watermark": said.watermark, "time": said.time}
    binding = {**exclusions, "name": "jumbf manifest", "alg": "sha256", "hash": digest, "pad": [0] * 8}
    definition = {
        "claim_generator_info": [{"name": "llama2", "version": package_version()}],
        "title": "generated text",
        "format": _FORMAT,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": LABEL, "data": about},
            {"label": "c2pa.hash.data", "data": binding},
        ],
    }
    signing.private_key(key)
    certificates = "".join(map(_pem, signing.certificates(chain)))
    try:
        info = c2pa.C2paSignerInfo(b"es256", certificates.encode(), key.read_bytes(), None)
        builder = c2pa.Builder(definition)
        builder.set_no_embed()
        made = builder.sign(c2pa.Signer.from_info(info), _FORMAT, io.BytesIO(data), io.BytesIO())
    except c2pa.C2paError as error:
        raise SafetyError(f"{key}: cannot sign a text with {chain}: {' '.join(str(error).split())[:200]}") from None
    return bytes(made)


def _libraries() -> tuple[Any, Any]:
    """c2pa and c2pa_text. Raises SafetyError where they are not installed."""
    try:
        import c2pa
        import c2pa_text
    except ImportError:
        raise SafetyError(_MISSING) from None
    return c2pa, c2pa_text
