"""``model.sig``: a signature over every file of an artifact, by the OpenSSF model-signing library, without a network.

The format is a Sigstore bundle around an in-toto statement; ``model_signing verify`` reads it too. Only keys and
certificates are offered: what a transparency log knows cannot be verified offline.

Two things the library leaves open are closed here. A signature may say itself which paths it does not cover: only
``model.sig`` may be left out. And a certificate is judged at the time when it began, so that an expired one passes:
here it must be valid now, for no trusted clock has stamped the signature.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.package.manifest import SIGNATURE_NAME
from compress.package.staging import write_file

if TYPE_CHECKING:
    from cryptography import x509

MAX_SIGNATURE_BYTES = 16 << 20
MAX_KEY_BYTES = 1 << 20
_RESIGN = "compress sign ARTIFACT signs what is there now"


class MissingLibraryError(CompressError):
    """``model-signing`` is not installed: nothing can be said of a signature."""


@dataclass(frozen=True)
class Trust:
    """Whom a verifier believes: the holder of a key, or of a certificate that a chain vouches for.

    Attributes:
        public_key: PEM, an elliptic curve's key.
        certificate_chain: PEM files, the root's among them.
        identity: The name that the signing certificate must have; ``None`` takes any that the chain vouches for.
    """

    public_key: Path | None = None
    certificate_chain: tuple[Path, ...] = ()
    identity: str | None = None

    def __post_init__(self) -> None:
        if self.public_key is not None and self.certificate_chain:
            raise UsageError(
                "a signature is by a key or by a certificate", hint="give --public-key or --certificate-chain"
            )
        if self.identity is not None and not self.certificate_chain:
            raise UsageError("an identity is what a certificate has", hint="give --certificate-chain too")

    @property
    def wanted(self) -> bool:
        """Return whether a signature is asked for."""
        return self.public_key is not None or bool(self.certificate_chain)


def sign(
    artifact: Path,
    private_key: Path,
    *,
    signing_certificate: Path | None = None,
    certificate_chain: Sequence[Path] = (),
) -> None:
    """Sign every file of an artifact, the manifest too, and write ``model.sig`` into it.

    Args:
        artifact: The artifact.
        private_key: PEM, not encrypted, on the curve P-256, P-384 or P-521.
        signing_certificate: PEM, of that key; without it the signature names no signer.
        certificate_chain: PEM files of what vouches for the certificate, with the root or without.

    Raises:
        CompressError: ``model-signing`` is missing, or a key or certificate cannot be used.
    """
    library = _library()
    for path in (private_key, *((signing_certificate,) if signing_certificate else ()), *certificate_chain):
        _read(path, MAX_KEY_BYTES)
    config = library.signing.Config().set_hashing_config(_covering(artifact))
    with _explained(f"the key in {private_key.name} cannot sign", hint="an elliptic curve's private key, PEM"):
        if signing_certificate is None:
            config.use_elliptic_key_signer(private_key=private_key)
        else:
            config.use_certificate_signer(
                private_key=private_key, signing_certificate=signing_certificate, certificate_chain=certificate_chain
            )
    with tempfile.TemporaryDirectory(prefix="compress-sign-") as work, _explained("the artifact cannot be signed"):
        beside = Path(work) / SIGNATURE_NAME
        config.sign(artifact, beside)
        write_file(artifact / SIGNATURE_NAME, beside.read_bytes())


def verify_signature(artifact: Path, trust: Trust) -> str:
    """Check that a trusted signer signed exactly the files that are there.

    Returns:
        Who signed: the certificate's subject, or the key's file.

    Raises:
        UsageError: A key or certificate of the verifier's cannot be read.
        CompressError: The signature is missing, damaged, by somebody else, or of other files.
    """
    library = _library()
    for path in (*((trust.public_key,) if trust.public_key else ()), *trust.certificate_chain):
        _read(path, MAX_KEY_BYTES)
    config = library.verifying.Config().set_hashing_config(_covering(artifact))
    with _explained("what shall be trusted cannot be read", hint="a public key or certificates, PEM", usage=True):
        if trust.public_key is not None:
            config.use_elliptic_key_verifier(public_key=trust.public_key)
        else:
            config.use_certificate_verifier(certificate_chain=trust.certificate_chain)
    bundle = _bundle(_read(artifact / SIGNATURE_NAME, MAX_SIGNATURE_BYTES))
    if ("publicKey" in bundle["verificationMaterial"]) != (trust.public_key is not None):
        kinds = ("a certificate", "a key") if trust.public_key is not None else ("a key", "a certificate")
        raise CompressError(f"it was signed by {kinds[0]}, not by {kinds[1]}")
    with tempfile.TemporaryDirectory(prefix="compress-verify-") as work:
        # A copy: what is verified and what the signer's name is read from are the same.
        copy = Path(work) / SIGNATURE_NAME
        copy.write_text(json.dumps(bundle), encoding="utf-8")
        # Of an old format the library warns on standard output, where one JSON document may be expected.
        with _explained("the signature does not hold"), redirect_stdout(sys.stderr):
            config.verify(artifact, copy)
    if trust.public_key is not None:
        return f"the holder of {trust.public_key.name}"
    with _explained("the signing certificate is not valid now"):
        certificates = _certificates(bundle)
        _check_now(certificates, trust.certificate_chain)
    signer = certificates[0]
    names = _names(signer)
    if trust.identity is not None and trust.identity not in names:
        raise CompressError(f"signed by {', '.join(sorted(names)) or 'nobody by name'}, not by {trust.identity}")
    return str(signer.subject.rfc4514_string())


def _bundle(content: bytes) -> dict[str, Any]:
    try:
        bundle = json.loads(content)
        bundle["verificationMaterial"].setdefault("tlogEntries", [])  # a field that may be left out when empty
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise CompressError("the signature is damaged: it is no Sigstore bundle") from None
    return dict(bundle)


def _check_now(certificates: Sequence[x509.Certificate], chain: Sequence[Path]) -> None:
    """Let OpenSSL build the chain once more, at the present time."""
    from cryptography.x509 import load_pem_x509_certificates
    from OpenSSL import crypto

    store = crypto.X509Store()
    for trusted in load_pem_x509_certificates(b"".join(_read(path, MAX_KEY_BYTES) for path in chain)):
        store.add_cert(crypto.X509.from_cryptography(trusted))
    first, *others = (crypto.X509.from_cryptography(certificate) for certificate in certificates)
    crypto.X509StoreContext(store, first, others).verify_certificate()


def _names(certificate: x509.Certificate) -> set[str]:
    """Return the names a certificate gives its holder: the common name, mail addresses, URIs and host names."""
    from cryptography import x509

    found = {str(item.value) for item in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)}
    try:
        other = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return found
    for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
        found.update(other.get_values_for_type(kind))
    return found


def _certificates(bundle: dict[str, Any]) -> list[x509.Certificate]:
    """Return the certificates of a signature, the signer's first, read as the verifier reads them."""
    from cryptography import x509
    from sigstore_models.bundle.v1 import Bundle

    chain = Bundle.from_dict(bundle).verification_material.x509_certificate_chain
    assert chain is not None, "verified by certificate"
    return [x509.load_der_x509_certificate(item.raw_bytes) for item in chain.certificates]


def _covering(artifact: Path) -> Any:
    """Return what digests an artifact for a signature: all of it but the signature; links are refused."""
    from model_signing import hashing

    class Covering(hashing.Config):
        """Refuses a signature that says it leaves anything else out."""

        def add_ignored_paths(self, *, model_path: Any, paths: Iterable[Any]) -> None:
            own = (Path(SIGNATURE_NAME), artifact / SIGNATURE_NAME)
            others = sorted(str(path) for path in paths if Path(path) not in own)
            if others:
                raise CompressError(f"the signature leaves out {others[0]}", hint=_RESIGN)

    config = Covering()  # type: ignore[no-untyped-call]
    config.use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    if len(content) > limit:
        raise UsageError(f"the file is larger than {limit >> 20} MiB", where=str(path))
    return content


@contextmanager
def _explained(what: str, *, hint: str | None = None, usage: bool = False) -> Iterator[None]:
    """Tell what the libraries complain of in one sentence: their errors are of many kinds, and of no common one."""
    kind: Callable[..., CompressError] = UsageError if usage else CompressError
    try:
        yield
    except CompressError:
        raise
    except Exception as error:  # noqa: BLE001 - see above
        first = (str(error).splitlines() or [""])[0]
        # The library prints digests as Python objects; which file they are of is what counts.
        first = re.sub(r"[][\"]", "", re.sub(r": Expected .*?(?=, \"|\]|$)", "", first))
        raise kind(f"{what}: {first or type(error).__name__}", hint=hint) from error


def _library() -> Any:
    try:
        import model_signing
        from model_signing import signing, verifying  # noqa: F401 - attributes of the package
    except ImportError as error:
        raise MissingLibraryError(
            f"signatures need the package model-signing and what it imports: {error}",
            hint="pip install 'compress-slm[sign]'",
        ) from None
    return model_signing
