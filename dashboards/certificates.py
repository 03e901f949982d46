"""Certificates by which the parts of the S3 store know each other, and nobody else's requests count."""

import datetime
import ipaddress
import shutil
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=3652)
SKEW = datetime.timedelta(days=1)  # of a clock that is set back later


def make_certificates(folder: Path, host: str) -> tuple[Path, Path, Path]:
    """One key whose certificate is good for both ends of a connection, unless it is there already.

    The authority's own key is not kept: nothing else is ever signed with it.

    Args:
        folder: of the files; only its owner can enter.
        host: an IP address, the only one that the certificate is good for.

    Returns:
        The files of the authority's certificate, of the certificate and of its key.
    """
    files = (folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    if folder.exists():
        return files
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a first start that was cut short
    unfinished.mkdir(mode=0o700)
    for file, content in zip(files, _sign(host), strict=True):
        path = unfinished / file.name
        path.touch(mode=0o600)
        path.write_bytes(content)
    unfinished.rename(folder)
    return files


def _sign(host: str) -> tuple[bytes, bytes, bytes]:
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "services' authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "services")])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    root = (
        _builder(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        _builder(issuer, subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return root.public_bytes(pem), leaf.public_bytes(pem), private


def _builder(issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + VALID)
    )
