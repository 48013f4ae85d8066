"""What a configuration means, in lines for a person."""

from __future__ import annotations

from collections.abc import Iterator

from dicomnode.settings import Settings


def summary(settings: Settings) -> Iterator[str]:
    """For ``check-config``; what is wrong is told by the findings beside it."""
    titles = ", ".join(settings.node.ae_titles)
    yield f"AE title {titles}, DICOM on {settings.dimse.host}:{settings.dimse.port}"
    yield _tls(settings)
    yield f"data in {settings.node.data_dir}"
    yield f"peers: {', '.join(p.name for p in settings.peers) or 'none: every caller is rejected'}"
    for peer in settings.peers:
        idle = [s for s in peer.allow if s in ("commit", "mpps")] + ["commitment"] * peer.commitment
        if idle:
            yield f"note: peer {peer.name}: {', '.join(idle)} has no effect yet in this version"
    for rule in settings.rules:
        yield f"rule {rule.name}: {', '.join(rule.models)} -> {', '.join(rule.send_to) or 'nowhere'}"
    if not settings.rules:
        yield "rules: none: what arrives is stored and indexed, nothing is analysed"


def _tls(settings: Settings) -> str:
    tls = settings.tls
    if tls.port is None:
        return "TLS: only to peers with tls = true" if tls.files else "TLS: off"
    plain = "; plain callers from other machines are rejected" if tls.required else ""
    return (
        f"TLS {tls.minimum_version} or newer on {tls.host}:{tls.port},"
        f" client certificates {tls.client_certificates}{plain}"
    )
