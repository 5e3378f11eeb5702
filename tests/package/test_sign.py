"""Signatures by keys and certificates, and everything that must break one."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from compress import cli
from compress.errors import UsageError
from compress.package.manifest import NAME, SIGNATURE_NAME, list_files, write_manifest
from compress.package.signing import Trust
from compress.package.verify import verify

Key = ec.EllipticCurvePrivateKey
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def save_key(path: Path) -> Key:
    """Make a key; its public half goes beside it with the suffix ``.pub``."""
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)
    return key


def certify(
    path: Path, key: Key, name: str, by: tuple[str, Key] | None = None, begin: float = -2, end: float = 30
) -> None:
    """Write a certificate, its own or another's, valid between two days from now."""
    issuer, signer = by or (name, key)

    def called(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(called(name)).issuer_name(called(issuer)).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begin * DAY).not_valid_after(NOW + end * DAY)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )  # fmt: skip
    if by is None:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    else:
        mail = x509.SubjectAlternativeName([x509.RFC822Name("release@example.org")])
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        builder = builder.add_extension(usage, critical=True).add_extension(mail, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    path.write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of keys and certificates: two roots, a signer, one that is expired, one whose root is."""
    place = tmp_path_factory.mktemp("keys")
    save_key(place / "mine.pem")
    save_key(place / "other.pem")
    root, other = save_key(place / "root.pem"), save_key(place / "other-root.pem")
    certify(place / "root.crt", root, "Root", begin=-60)
    certify(place / "expired-root.crt", root, "Root", begin=-60, end=-1)
    certify(place / "other-root.crt", other, "Other root")
    signer = save_key(place / "signer.pem")
    certify(place / "signer.crt", signer, "Signer", ("Root", root))
    certify(place / "expired.crt", signer, "Signer", ("Root", root), begin=-30, end=-1)
    return place


def sign(artifact: Path, *words: object) -> int:
    return cli.run(["sign", str(artifact), *map(str, words)])


def check(artifact: Path, trust: Trust) -> tuple[str, set[str]]:
    found = verify(artifact, trust)
    return found.signature, {problem.kind for problem in found.problems}


def test_a_signed_artifact_passes_and_only_with_its_key(artifact: Path, keys: Path) -> None:
    mine, other = Trust(keys / "mine.pub"), Trust(keys / "other.pub")
    assert check(artifact, mine) == ("absent", {"unsigned"})
    assert sign(artifact, "--private-key", keys / "mine.pem") == 0
    assert check(artifact, mine) == ("valid", set())
    assert check(artifact, other) == ("invalid", {"signature"})
    assert check(artifact, Trust()) == ("not checked", set())
    # Signing again replaces the signature.
    assert sign(artifact, "--private-key", keys / "other.pem") == 0
    assert check(artifact, other) == ("valid", set())


def test_digests_made_anew_do_not_help(artifact: Path, keys: Path) -> None:
    sign(artifact, "--private-key", keys / "mine.pem")
    config = artifact / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    record = json.loads((artifact / NAME).read_text())
    bill = artifact / "sbom.cdx.json"
    old = {item["name"]: item["sha256"] for item in record["files"]}
    new = {item["name"]: item["sha256"] for item in list_files(artifact)}
    bill.write_text(bill.read_text().replace(old[config.name], new[config.name]))
    write_manifest(artifact, record)
    assert check(artifact, Trust()) == ("not checked", set())  # all the digests agree: the control
    assert check(artifact, Trust(keys / "mine.pub")) == ("invalid", {"signature"})


def test_it_covers_every_file(artifact: Path, keys: Path) -> None:
    sign(artifact, "--private-key", keys / "mine.pem")
    bundle = json.loads((artifact / SIGNATURE_NAME).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    covered = {item["name"] for item in statement["predicate"]["resources"]}
    assert covered == {path.name for path in artifact.iterdir()} - {SIGNATURE_NAME}
    assert NAME in covered
    (artifact / ".gitignore").touch()  # what the library leaves out unless told
    assert check(artifact, Trust(keys / "mine.pub")) == ("invalid", {"signature", "extra"})


def test_a_signature_that_leaves_files_out_is_refused(artifact: Path, keys: Path) -> None:
    import model_signing

    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME, "config.json"])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys / "mine.pem")
    config.set_hashing_config(hashing).sign(artifact, artifact / SIGNATURE_NAME)
    (problem,) = verify(artifact, Trust(keys / "mine.pub")).problems
    assert problem.kind == "signature" and "leaves out" in problem.message
    # The library itself takes it: the control.
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys / "mine.pub").verify(
        artifact, artifact / SIGNATURE_NAME
    )


def with_certificate(artifact: Path, keys: Path, name: str, *chain: str) -> int:
    words = [word for item in chain for word in ("--certificate-chain", keys / item)]
    return sign(artifact, "--private-key", keys / "signer.pem", "--signing-certificate", keys / name, *words)


def test_a_certificate_and_its_root(artifact: Path, keys: Path) -> None:
    assert with_certificate(artifact, keys, "signer.crt", "root.crt") == 0
    root = keys / "root.crt"
    found = verify(artifact, Trust(None, (root,)))
    assert (found.problems, found.signer) == ([], "CN=Signer")
    assert check(artifact, Trust(None, (keys / "other-root.crt",))) == ("invalid", {"signature"})
    for identity in ("Signer", "release@example.org"):
        assert check(artifact, Trust(None, (root,), identity)) == ("valid", set())
    assert check(artifact, Trust(None, (root,), "Root")) == ("invalid", {"signature"})
    # By a key, it is not signed at all.
    assert check(artifact, Trust(keys / "mine.pub")) == ("invalid", {"signature"})


@pytest.mark.parametrize(("certificate", "root"), [("expired.crt", "root.crt"), ("signer.crt", "expired-root.crt")])
def test_what_is_expired_is_refused(certificate: str, root: str, artifact: Path, keys: Path) -> None:
    """The library judges at the time when the certificate began, and takes both."""
    import model_signing

    assert with_certificate(artifact, keys, certificate, root) == 0
    (problem,) = verify(artifact, Trust(None, (keys / root,))).problems
    assert problem.kind == "signature" and "expired" in problem.message
    model_signing.verifying.Config().use_certificate_verifier(certificate_chain=[keys / root]).verify(
        artifact, artifact / SIGNATURE_NAME
    )


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"verificationMaterial": {}}', "\xff"])
def test_a_damaged_signature(text: str, artifact: Path, keys: Path) -> None:
    (artifact / SIGNATURE_NAME).write_text(text, encoding="latin-1")
    assert check(artifact, Trust(keys / "mine.pub")) == ("invalid", {"signature"})


def test_json_stays_one_document(artifact: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a signature without a hint of its key the library warns on standard output."""
    sign(artifact, "--private-key", keys / "mine.pem")
    bundle = json.loads((artifact / SIGNATURE_NAME).read_text())
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    (artifact / SIGNATURE_NAME).write_text(json.dumps(bundle))
    capsys.readouterr()
    assert cli.run(["verify", str(artifact), "--public-key", str(keys / "mine.pub"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["signature"] == {"signer": "the holder of mine.pub", "state": "valid"}
    assert "WARNING" in err


def test_what_is_not_whole_is_not_signed(artifact: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact / "extra").touch()
    assert sign(artifact, "--private-key", keys / "mine.pem") == 1
    assert "not whole" in capsys.readouterr().err
    assert not (artifact / SIGNATURE_NAME).exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--private-key", "nowhere"], 2),
        (["--private-key", "mine.pub"], 1),
        (["--private-key", "mine.pem", "--certificate-chain", "root.crt"], 2),
        (["--private-key", "mine.pem", "--signing-certificate", "signer.crt"], 2),
        (["--private-key", "mine.pem", "--signing-certificate", "signer.crt", "--certificate-chain", "root.crt"], 1),
    ],
)
def test_wrong_keys(words: list[str], code: int, artifact: Path, keys: Path) -> None:
    assert sign(artifact, *(word if word.startswith("--") else keys / word for word in words)) == code
    assert not (artifact / SIGNATURE_NAME).exists()


def test_what_cannot_be_trusted(artifact: Path, keys: Path) -> None:
    sign(artifact, "--private-key", keys / "mine.pem")
    for trust in (Trust(keys / "nowhere"), Trust(keys / "mine.pem"), Trust(None, (keys / "mine.pub",))):
        with pytest.raises(UsageError):
            verify(artifact, trust)
    with pytest.raises(UsageError, match="by a key or by a certificate"):
        Trust(keys / "mine.pub", (keys / "root.crt",))
    with pytest.raises(UsageError, match="an identity"):
        Trust(keys / "mine.pub", (), "Signer")


def test_without_the_package_the_extra_is_named(
    artifact: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert sign(artifact, "--private-key", keys / "mine.pem") == 1
    assert "compress-slm[sign]" in capsys.readouterr().err
