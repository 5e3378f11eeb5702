"""``compress verify`` and ``compress sign``: is an artifact whole and unchanged, and who says so."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli_options import json_option, print_json
from compress.errors import EXIT_FAILED, EXIT_OK, UsageError

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("artifact", type=_FILE)
@click.option("--public-key", type=_FILE, help="Ask for a signature by the holder of this key (PEM, elliptic curve).")
@click.option(
    "--certificate-chain",
    type=_FILE,
    multiple=True,
    help="Ask for a signature by a certificate that these vouch for (PEM, the root's among them); repeatable.",
)
@click.option(
    "--identity", metavar="NAME", help="Common name, mail address, URI or host name that the certificate must have."
)
@json_option
def verify(
    artifact: Path,
    public_key: Path | None,
    certificate_chain: tuple[Path, ...],
    identity: str | None,
    as_json: bool,
) -> int:
    """Check an ARTIFACT's files, graphs, report, bill of materials and signature; every problem is told.

    No model is loaded and nothing is written. Exit code 1 where anything is wrong.
    """
    from compress.package.signing import Trust
    from compress.package.verify import text
    from compress.package.verify import verify as check

    result = check(artifact, Trust(public_key, certificate_chain, identity))
    if as_json:
        print_json(result.document())
    else:
        for line in text(result):
            click.echo(line)
    return EXIT_OK if result.ok else EXIT_FAILED


@click.command()
@click.argument("artifact", type=_FILE)
@click.option("--private-key", type=_FILE, required=True, help="The signer's key: PEM, P-256, P-384 or P-521.")
@click.option("--signing-certificate", type=_FILE, help="The certificate of that key, PEM.")
@click.option(
    "--certificate-chain", type=_FILE, multiple=True, help="What vouches for the certificate, PEM; repeatable."
)
def sign(
    artifact: Path, private_key: Path, signing_certificate: Path | None, certificate_chain: tuple[Path, ...]
) -> int:
    """Sign every file of an ARTIFACT, the manifest too: writes model.sig into it.

    The artifact is verified first; what is not whole is not signed. Without a network: no transparency log.
    """
    from compress.errors import CompressError
    from compress.package import signing
    from compress.package.manifest import SIGNATURE_NAME
    from compress.package.verify import verify as check

    if bool(certificate_chain) != (signing_certificate is not None):
        raise UsageError(
            "a certificate goes with the chain that vouches for it",
            hint="give both --signing-certificate and --certificate-chain, or neither",
        )
    found = check(artifact)
    if not found.ok:
        first = found.problems[0]
        raise CompressError(
            f"the artifact is not whole: {first.message}",
            where=first.file,
            hint="compress verify ARTIFACT tells all of it",
        )
    signing.sign(artifact, private_key, signing_certificate=signing_certificate, certificate_chain=certificate_chain)
    click.echo(f"signed: {artifact / SIGNATURE_NAME}")
    return EXIT_OK
