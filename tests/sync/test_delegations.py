"""Delegated roles of a repository written by python-tuf: each signs for its own paths, and harms nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, SuccinctRoles, Targets

from dicomnode.index.operation import Events, Models
from dicomnode.sync.delegations import probe_of
from tests.sync.test_archive import GOOD, tree
from tests.sync.test_trust import ARCHIVE, Case, empty
from tests.sync.tuf_case import TufRepository, later

__all__ = ["empty"]  # a fixture
VENDOR = "acme-lung/3.0.0.tar.gz"


class Vendor:
    """A role with a key of its own, below ``parent`` (the repository's targets where there is none)."""

    def __init__(
        self, repository: TufRepository, name: str, paths: list[str], *, parent: Vendor | None = None, **more: Any
    ) -> None:
        self.repository, self.name, self.key = repository, name, CryptoSigner.generate_ed25519()
        self.targets = Targets(expires=later())
        self.targets.version = 0
        above = parent.targets if parent else repository.targets
        above.delegations = above.delegations or Delegations({}, {})
        assert above.delegations.roles is not None
        role = DelegatedRole(name, [], 1, more.get("terminating", False), paths=paths)
        above.delegations.roles[name] = role
        above.add_key(self.key.public_key, name)

    def add(self, path: str, data: bytes) -> None:
        own, self.repository.targets.targets = self.repository.targets.targets, self.targets.targets
        self.repository.add(path, data)
        self.repository.targets.targets = own

    def publish(self, signer: Any = None) -> None:
        self.targets.version += 1
        self.repository.put(self.name, self.targets, signer or self.key)
        self.repository.snapshot.meta[f"{self.name}.json"] = MetaFile(version=self.targets.version)
        self.repository.publish()


@pytest.fixture
def case(tmp_path: Path, empty: Path) -> Any:
    made = Case(tmp_path, empty)
    yield made
    made.db.close()


def offered(case: Case) -> dict[str, str]:
    """Path at the repository without its digest -> role."""
    return {f"{o.name}/{o.version}": o.role for o in case.trust["offers"]}


def test_a_vendor_signs_for_its_own_models(case: Case) -> None:
    vendor = Vendor(case.repository, "acme", ["acme-*/*"])
    vendor.add(VENDOR, ARCHIVE)
    vendor.publish()
    case.entry = {"name": "acme-lung"}
    case.verify = lambda path: None  # type: ignore[method-assign]
    case.run()
    assert offered(case) == {"ct-lung/2.0.0": "", "acme-lung/3.0.0": "acme"}
    assert Models(case.db).active()["acme-lung"] == "3.0.0"
    assert tree(case.data_dir / "models" / "acme-lung" / "3.0.0") == GOOD
    assert (case.trust["state"], case.trust["reason"]) == ("current", "")
    asked = len(case.repository.asked)
    case.run(pulls=0)
    assert not any("acme" in path for path in case.repository.asked[asked:]), "its file is in the cache"


def test_what_it_may_not_sign_for_is_refused(case: Case) -> None:
    vendor = Vendor(case.repository, "acme", ["acme-*/*"])
    vendor.add("ct-lung/9.0.0.tar.gz", ARCHIVE + b"evil")
    vendor.add("ct-lung/2.0.0.tar.gz", ARCHIVE + b"evil")
    vendor.add(VENDOR, ARCHIVE)
    vendor.publish()
    case.run()
    case.activated("2.0.0")
    assert offered(case) == {"ct-lung/2.0.0": "", "acme-lung/3.0.0": "acme"}
    assert "acme lists what it may not sign for" in case.trust["reason"]
    [event] = Events(case.db).listing(kind="model-repository-role")
    assert "acme" in event["text"]
    case.run()
    assert len(Events(case.db).listing(kind="model-repository-role")) == 1


def test_the_repositorys_own_word_comes_first(case: Case) -> None:
    vendor = Vendor(case.repository, "all", ["*/*"])
    vendor.add("ct-lung/2.0.0.tar.gz", ARCHIVE + b"another")
    vendor.publish()
    case.run()
    case.activated("2.0.0")
    assert offered(case) == {"ct-lung/2.0.0": ""}


def broken_key(vendor: Vendor) -> None:
    vendor.publish(CryptoSigner.generate_ed25519())


def expired(vendor: Vendor) -> None:
    vendor.targets.expires = later(-1)
    vendor.publish()


def absent(vendor: Vendor) -> None:
    vendor.publish()
    del vendor.repository.files[f"metadata/{vendor.targets.version}.acme.json"]


def other_version(vendor: Vendor) -> None:
    vendor.publish()
    new = vendor.targets.version
    vendor.repository.files[f"metadata/{new}.acme.json"] = vendor.repository.files[f"metadata/{new - 1}.acme.json"]


def not_in_the_snapshot(vendor: Vendor) -> None:
    vendor.publish()
    vendor.repository.snapshot.meta.pop("acme.json")
    vendor.repository.publish()


def garbage(vendor: Vendor) -> None:
    vendor.publish()
    vendor.repository.files[f"metadata/{vendor.targets.version}.acme.json"] = b"{"


@pytest.mark.parametrize("attack", [broken_key, expired, absent, other_version, not_in_the_snapshot, garbage])
def test_a_broken_role_takes_nothing_from_the_others(case: Case, attack: Any) -> None:
    vendor = Vendor(case.repository, "acme", ["acme-*/*"])
    vendor.add(VENDOR, ARCHIVE)
    other = Vendor(case.repository, "zeta", ["zeta-*/*"])
    other.add("zeta-lung/1.0.0.zip", ARCHIVE)
    vendor.targets.version = other.targets.version = 1
    vendor.publish()
    other.publish()
    attack(vendor)
    case.run()
    case.activated("2.0.0")
    assert offered(case) == {"ct-lung/2.0.0": "", "zeta-lung/1.0.0": "zeta"}
    assert case.trust["state"] == "current" and "role acme is not followed" in case.trust["reason"]


def test_a_role_that_is_rolled_back_is_refused(case: Case) -> None:
    """By the snapshot, which must not name an older file of it than before."""
    vendor = Vendor(case.repository, "acme", ["acme-*/*"])
    vendor.add(VENDOR, ARCHIVE)
    vendor.publish()
    vendor.publish()
    case.run(pulls=0)
    vendor.targets.version = 0
    vendor.publish()
    case.run(pulls=0)
    assert case.trust["state"] == "refused"


def test_a_role_that_ends_before_the_next_look_vouches_for_nothing(case: Case) -> None:
    vendor = Vendor(case.repository, "acme", ["acme-*/*"])
    vendor.add(VENDOR, ARCHIVE)
    vendor.targets.expires = later(2)
    vendor.publish()
    case.entry = {"name": "acme-lung"}
    case.run(pulls=0)
    case.clock.now += 3 * 86_400
    case.run(refresh=False)
    assert "acme-lung" not in Models(case.db).active() and case.pull is None


def test_roles_below_roles_and_the_end_of_the_search(case: Case) -> None:
    vendor = Vendor(case.repository, "acme", ["acme-*/*"])
    team = Vendor(case.repository, "team", ["acme-heart/*", "ct-lung/*"], parent=vendor)
    team.add("acme-heart/1.0.0.zip", ARCHIVE + b"1")
    team.add("ct-lung/8.0.0.zip", ARCHIVE + b"2")
    again = Vendor(case.repository, "acme", ["acme-*/*"], parent=team)  # a circle
    again.targets = vendor.targets
    last = Vendor(case.repository, "last", ["zeta-*/*"], terminating=True)
    last.add("zeta-a/1.0.0.zip", ARCHIVE + b"3")
    behind = Vendor(case.repository, "behind", ["zeta-*/*"])
    behind.add("zeta-b/1.0.0.zip", ARCHIVE + b"4")
    for one in (vendor, team, last, behind):
        one.publish()
    case.run(pulls=0)
    assert offered(case) == {"ct-lung/2.0.0": "", "acme-heart/1.0.0": "team", "zeta-a/1.0.0": "last"}
    assert "behind" in case.trust["reason"] and "team lists what it may not sign for" in case.trust["reason"]


def test_bins_are_named_and_not_followed(case: Case) -> None:
    key = CryptoSigner.generate_ed25519()
    bins = SuccinctRoles([key.public_key.keyid], 1, 2, "bin")
    case.repository.targets.delegations = Delegations({key.public_key.keyid: key.public_key}, None, bins)
    case.repository.publish()
    case.run()
    case.activated("2.0.0")
    assert "hash prefixes" in case.trust["reason"]


def test_a_path_to_ask_for() -> None:
    def role(*paths: str) -> DelegatedRole:
        return DelegatedRole("r", [], 1, False, paths=list(paths))

    assert probe_of(role("acme-*/*")) == "acme-x/x"
    assert probe_of(role("acme-lung/1.?.0.zip")) == "acme-lung/1.x.0.zip"
    assert probe_of(role("a[bc]/x", "d/*")) == "d/x"
    assert probe_of(role("a[bc]/x")) is None
    assert probe_of(DelegatedRole("r", [], 1, False, path_hash_prefixes=["00"])) is None
