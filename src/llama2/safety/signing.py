"""Signed weights: OpenSSF model signing by key, offline; and keys for that and for signed texts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2.errors import SafetyError
from llama2.safety import keys

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

#: The signature in a model's folder; beside a model's file it is FILE.sig.
SIGNATURE = "model.sig"
#: Parts of the library's message about files that differ.
_DIFFERENCES = re.compile(r"Hash mismatch for '[^']*'|(?:Extra|Missing) files [^\"]*?'[^']*': [^'\"\]]+")
_MISSING = "signing needs more libraries; `pip install 'whole-llama[safeguard]'` brings them"


def signature_of(model: Path) -> Path:
    """Where a model's signature is looked for."""
    return model / SIGNATURE if model.is_dir() else model.with_name(f"{model.name}.sig")


def sign(model: Path, key: Path, signature: Path | None = None) -> Path:
    """Sign every file of a model by a private key (P-256, 384 or 521 in PEM), and return the signature's path.

    Raises SafetyError for a model or a key that is not there, or a key of the wrong kind.
    """
    signature = signature or signature_of(model)
    private_key(key)
    if not model.exists():
        raise SafetyError(f"{model}: no such file or folder")
    try:
        from model_signing import signing
    except ImportError:
        raise SafetyError(_MISSING) from None
    config = signing.Config().set_hashing_config(_hashing(model, signature))  # type: ignore[no-untyped-call]
    try:
        config.use_elliptic_key_signer(private_key=key).sign(model, signature)
    except (ValueError, OSError) as error:
        raise SafetyError(f"{model}: cannot be signed ({error})") from None
    return signature


def verify(model: Path, key: Path, signature: Path | None = None) -> None:
    """Check that a model is what the owner of a key signed, to the last byte, with no file more or less.

    `key` is a public key, or a certificate, which must be valid now. Raises SafetyError, in one line, where it is not.
    """
    signature = signature or signature_of(model)
    if not signature.is_file():
        raise SafetyError(f"{model}: is not signed, since there is no {signature}; sign it with `llama2 sign`")
    try:
        from model_signing import verifying
    except ImportError:
        raise SafetyError(_MISSING) from None
    with _public_key(key) as public:
        config = verifying.Config().set_hashing_config(_hashing(model, signature))  # type: ignore[no-untyped-call]
        try:
            config.use_elliptic_key_verifier(public_key=public).verify(model, signature)
        except Exception as error:  # whatever a hostile signature makes the library raise, it does not hold
            raise SafetyError(f"{model}: its signature by {key} does not hold: {_reason(error)}") from None


def _hashing(model: Path, signature: Path) -> Any:
    """How files are hashed: all of them but the signature, also those of git, and what links lead to."""
    from model_signing import hashing

    ignored = [signature.relative_to(model)] if signature.is_relative_to(model) and model.is_dir() else []
    config = hashing.Config().use_file_serialization(allow_symlinks=True)  # type: ignore[no-untyped-call]
    return config.set_ignored_paths(paths=ignored, ignore_git_paths=False).set_allow_symlinks(True)


def _reason(error: Exception) -> str:
    """What is wrong, without the digests that the library prints for each file."""
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "InvalidSignature":
        text = "it was made by another key, or changed"
    text = "; ".join(_DIFFERENCES.findall(text.replace("\\", ""))) or text
    return text if len(text) <= 300 else f"{text[:300]} ..."


def private_key(path: Path) -> EllipticCurvePrivateKey:
    """An elliptic-curve key in PEM. Raises SafetyError for a file of another kind."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    except ImportError:
        raise SafetyError(_MISSING) from None
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SafetyError(
            f"{path}: is not a private key in PEM without a password; make one with `llama2 sign key`"
        ) from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise SafetyError(f"{path}: is not a key of an elliptic curve; make one with `llama2 sign key`")
    return key


def certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, each valid now. Raises SafetyError where one is not, or there is none."""
    try:
        from cryptography import x509
    except ImportError:
        raise SafetyError(_MISSING) from None
    try:
        found = x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise SafetyError(f"{path}: has no certificate in PEM; make one with `llama2 sign key`") from None
    now = datetime.now(UTC)
    for certificate in found:
        if now > certificate.not_valid_after_utc:
            raise SafetyError(
                f"{path}: the key expired on {certificate.not_valid_after_utc:%Y-%m-%d}; sign with a new one"
            )
        if now < certificate.not_valid_before_utc:
            raise SafetyError(f"{path}: the key is not valid before {certificate.not_valid_before_utc:%Y-%m-%d}")
    return found


@contextmanager
def _public_key(path: Path) -> Iterator[Path]:
    """A file with the public key of a PEM file, which has that or a certificate."""
    from cryptography.hazmat.primitives import serialization

    data = _read(path)
    if b"BEGIN CERTIFICATE" not in data:
        try:
            serialization.load_pem_public_key(data)
        except ValueError:
            raise SafetyError(f"{path}: is neither a public key nor a certificate in PEM") from None
        yield path
        return
    key = certificates(path)[0].public_key()
    with tempfile.TemporaryDirectory() as folder:
        public = Path(folder) / "public.pem"
        public.write_bytes(
            key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        yield public


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SafetyError(f"{path}: cannot be read ({error.strerror})") from None


def create_key(private: Path, chain: Path, name: str, days: int) -> None:
    """Write a new P-256 key, and its certificate with that of an authority made for it, whose key is thrown away.

    The certificate says that it signs, not who trusts it. Raises SafetyError where a file is there already.
    """
    try:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise SafetyError(_MISSING) from None
    if chain.exists():
        raise SafetyError(f"{chain}: is there already; a certificate is never overwritten")
    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _builder(f"{name}, authority", f"{name}, authority", root, root, days, authority=True)
    leaf = _builder(name, f"{name}, authority", key, root, days, authority=False)
    signed = [each.sign(root, hashes.SHA256()) for each in (leaf, authority)]
    encodings = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    keys.write_secret(private, key.private_bytes(*encodings))
    chain.write_bytes(b"".join(each.public_bytes(serialization.Encoding.PEM) for each in signed))


def _builder(
    name: str,
    issuer: str,
    key: EllipticCurvePrivateKey,
    signer: EllipticCurvePrivateKey,
    days: int,
    *,
    authority: bool,
) -> x509.CertificateBuilder:
    """A certificate of one of both kinds, as C2PA's profile has them, still unsigned."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, name.removesuffix(", authority"))
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    now = datetime.now(UTC)
    public, issuing = key.public_key(), signer.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing), critical=False)
    )
    if authority:
        return builder
    return builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
