"""Signed texts: they survive copying, fail after one changed letter, and say what is missing when stripped."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from commands import done
from llama2.cli.main import run
from llama2.errors import SafetyError
from llama2.safety import manifest, signing
from llama2.safety.manifest import Generation
from serving import write_model

TEXT = "Où est le café ?\nLà-bas."
SAID = Generation("tiny", "sha256:00", "synthid", "2026-12-01T00:00:00Z")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    signing.create_key(folder / "ours.pem", folder / "ours.crt", "Example Ltd", 30)
    signing.create_key(folder / "theirs.pem", folder / "theirs.crt", "Other Ltd", 30)
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path) -> str:
    return manifest.embed(TEXT, SAID, keys / "ours.pem", keys / "ours.crt")


def test_a_signed_text_reads_as_before_and_survives_copying(signed: str, keys: Path) -> None:
    assert signed.startswith(TEXT)
    invisible = signed.removeprefix(TEXT)
    assert all(unicodedata.category(letter) in ("Mn", "Cf") for letter in invisible)
    for copied in (signed, f"{signed}\r\n", unicodedata.normalize("NFD", signed), signed.encode().decode()):
        found = manifest.check(copied, keys / "ours.crt")
        assert found == Generation(SAID.model, SAID.weights, SAID.watermark, SAID.time, "Example Ltd")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("café", "cafe"), "is not the one that was signed"),
        (lambda text: text.replace("Où", "Ou", 1), "is not the one that was signed"),
        (lambda text: "And " + text, "is not the one that was signed"),
        (lambda text: text + "!", "is not the one that was signed"),
        (lambda text: TEXT, "has no manifest: it was never signed, or was stripped of it"),
        (lambda text: text[:-200], "is not the one that was signed"),
        (lambda text: text[:500], "the text has no manifest"),
        (lambda text: text + text.removeprefix(TEXT), "several manifests"),
        (lambda text: text[:700] + chr(ord(text[700]) ^ 1) + text[701:], ""),
    ],
)
def test_what_changed_is_refused_in_one_line(signed: str, keys: Path, change: object, problem: str) -> None:
    with pytest.raises(SafetyError) as found:
        manifest.check(change(signed), keys / "ours.crt")  # type: ignore[operator]
    assert problem in str(found.value)
    assert "\n" not in str(found.value)


def test_words_in_the_manifests_own_place_are_refused(signed: str, keys: Path) -> None:
    """The hash leaves that place out. A shorter wrapper would make room in it for words that nobody signed."""
    import c2pa_text

    inside, _, length = c2pa_text.find_wrapper_info(signed)
    words = " I never said so."
    forged = TEXT + words + c2pa_text.encode_wrapper_padded(inside, length - len(words.encode()))
    assert len(forged.encode()) == len(signed.encode())
    with pytest.raises(SafetyError, match="is not the one that was signed"):
        manifest.check(forged, keys / "ours.crt")


def test_somebody_elses_signature_is_refused(signed: str, keys: Path) -> None:
    with pytest.raises(SafetyError, match="is not signed by the owner of this certificate"):
        manifest.check(signed, keys / "theirs.crt")
    with pytest.raises(SafetyError, match="cannot sign a text"):
        manifest.embed(TEXT, SAID, keys / "theirs.pem", keys / "ours.crt")
    with pytest.raises(SafetyError, match="has a manifest already"):
        manifest.embed(signed, SAID, keys / "ours.pem", keys / "ours.crt")


def test_a_manifest_beside_the_text(keys: Path) -> None:
    made = manifest.beside(TEXT, SAID, keys / "ours.pem", keys / "ours.crt")
    assert manifest.check(TEXT, keys / "ours.crt", made).model == "tiny"
    with pytest.raises(SafetyError, match="is not the one that was signed"):
        manifest.check(TEXT + ".", keys / "ours.crt", made)
    with pytest.raises(SafetyError, match="cannot be read"):
        manifest.check(TEXT, keys / "ours.crt", b"no manifest")


def test_c2pa_rs_finds_a_manifest_beside_a_text_valid(keys: Path) -> None:
    """By c2pa-rs' own word, without a certificate that is trusted."""
    import io

    import c2pa

    made = manifest.beside(TEXT, SAID, keys / "ours.pem", keys / "ours.crt")
    report = json.loads(c2pa.Reader("text/plain", io.BytesIO(TEXT.encode()), made).json())
    assert report["validation_state"] == "Valid"


def test_weights_have_a_digest(tmp_path: Path) -> None:
    """Of a file as sha256sum has it; of a folder, by its files' names and contents, but the signature."""
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert manifest.weights_digest(tmp_path / "a") == f"sha256:{known}"
    before = manifest.weights_digest(tmp_path)
    (tmp_path / "model.sig").write_text("x")
    assert manifest.weights_digest(tmp_path) == before
    (tmp_path / "b").write_text("x")
    assert manifest.weights_digest(tmp_path) != before


def test_the_commands_sign_an_answer_and_check_it(
    keys: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(write_model(tmp_path))
    answer = done(
        capfd, "generate", "-m", model, "to be", "--max-tokens", "9", "--seed", "1", "--sign", str(keys / "ours")
    )
    file = tmp_path / "answer.txt"
    file.write_text(answer, encoding="utf-8")
    found = json.loads(done(capfd, "verify", "text", str(file), "--key", str(keys / "ours.crt"), "--json"))
    assert (found["signer"], found["model"]) == ("Example Ltd", model)
    assert found["weights"] == manifest.weights_digest(Path(model))
    plain, beside = tmp_path / "plain.txt", tmp_path / "plain.c2pa"
    plain.write_text(TEXT, encoding="utf-8")
    done(capfd, "sign", "text", str(plain), "-m", model, "--sign", str(keys / "ours"), "--beside", str(beside))
    words = ("verify", "text", str(plain), "--key", str(keys / "ours.crt"))
    assert "Example Ltd" in done(capfd, *words, "--manifest", str(beside))
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code == 1
    assert "has no manifest" in capfd.readouterr().err
