"""Signed weights: whatever changes in a folder is found, and the refusal is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from commands import done
from folders import Folder
from llama2.cli.main import run
from llama2.errors import SafetyError
from llama2.safety import signing


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    signing.create_key(tmp_path / "ours.pem", tmp_path / "ours.crt", "Example Ltd", 30)
    signing.create_key(tmp_path / "theirs.pem", tmp_path / "theirs.crt", "Other Ltd", 30)
    return tmp_path


@pytest.fixture
def model(keys: Path) -> Path:
    path = Folder().write(keys / "model")
    signing.sign(path, keys / "ours.pem")
    return path


def test_a_signed_model_holds(model: Path, keys: Path) -> None:
    signing.verify(model, keys / "ours.crt")
    public = keys / "public.pem"
    command = ["openssl", "x509", "-in", str(keys / "ours.crt"), "-pubkey", "-noout", "-out", str(public)]
    subprocess.run(command, check=True)
    signing.verify(model, public)
    assert (keys / "ours.pem").stat().st_mode & 0o777 == 0o600


def test_model_signings_own_program_agrees(model: Path, keys: Path) -> None:
    public = keys / "public.pem"
    subprocess.run(["openssl", "ec", "-in", str(keys / "ours.pem"), "-pubout", "-out", str(public)], check=True)
    options = ["--signature", str(model / "model.sig"), "--public_key", str(public), "--allow_symlinks"]
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(model), *options]
    ignored = ["--ignore-paths", str(model / "model.sig"), "--no-ignore-git-paths"]
    done = subprocess.run([*command, *ignored], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def one_byte(model: Path, keys: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)


def expired(model: Path, keys: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = signing.private_key(keys / "ours.pem")
    old = x509.load_pem_x509_certificate((keys / "ours.crt").read_bytes())
    then = datetime.now(UTC) - timedelta(days=400)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(then).not_valid_after(then + timedelta(days=365))
    made = builder.sign(key, hashes.SHA256())
    (keys / "ours.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (one_byte, "Hash mismatch for 'model.safetensors'"),
        (lambda model, keys: (model / "more.txt").write_text("x"), "Extra files found in model 'model': more.txt"),
        (lambda model, keys: (model / ".gitattributes").write_text("x"), "Extra files found"),
        (lambda model, keys: (model / "tokenizer.json").unlink(), "Missing files in model 'model': tokenizer.json"),
        (lambda model, keys: (model / "model.sig").unlink(), "is not signed"),
        (lambda model, keys: (model / "model.sig").write_text("{}"), "does not hold"),
        (lambda model, keys: shutil.copy(keys / "theirs.crt", keys / "ours.crt"), "Key mismatch"),
        (expired, "the key expired on"),
        (lambda model, keys: (keys / "ours.crt").write_text("key"), "is neither a public key nor a certificate"),
        (lambda model, keys: (keys / "ours.crt").unlink(), "cannot be read"),
    ],
)
def test_what_changed_is_refused_in_one_line(
    model: Path, keys: Path, damage: Callable[[Path, Path], object], problem: str
) -> None:
    damage(model, keys)
    with pytest.raises(SafetyError) as found:
        signing.verify(model, keys / "ours.crt")
    assert problem in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("key", "is not a private key in PEM"), (None, "cannot be read")],
)
def test_a_wrong_private_key_is_refused(model: Path, keys: Path, text: str | None, problem: str) -> None:
    path = keys / "other.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SafetyError, match=problem):
        signing.sign(model, path)
    with pytest.raises(SafetyError, match="is there already"):
        signing.create_key(keys / "ours.pem", keys / "new.crt", "x", 1)


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_weights_without_the_demanded_signature_are_refused(
    model: Path, keys: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    one_byte(model, keys)
    words = ["-m", str(model), "--signed-by", str(keys / "ours.crt")]
    with pytest.raises(SystemExit) as ended:
        run([command, *([] if command == "serve" else ["a"]), *words, *(["--port", "0"] if command == "serve" else [])])
    assert ended.value.code == 1
    assert "does not hold: Hash mismatch" in capfd.readouterr().err


def test_the_commands(model: Path, keys: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done(capfd, "sign", "key", "--out", str(keys / "new"), "--days", "3")
    file = keys / "tiny.gguf"
    shutil.copy(model / "model.safetensors", file)
    done(capfd, "sign", str(file), "--key", str(keys / "new.pem"))
    assert "unchanged" in done(capfd, "verify", str(file), "--key", str(keys / "new.crt"))
    assert (keys / "tiny.gguf.sig").exists()
