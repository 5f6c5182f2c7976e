"""Everything that can be checked about a ledger, again and from its files."""

from __future__ import annotations

from polyclinic.errors import ContributionError
from polyclinic.secure.identity import fingerprint
from polyclinic.secure.key_files import from_base64
from polyclinic.vectors.contribution import ALLOWED, read_statement
from polyclinic.vectors.folders import is_digest, plain_names
from polyclinic.vectors.ledger import (
    ABOUT,
    BASE,
    CHAIN,
    CONTRIBUTIONS,
    INCOMING,
    ROSTER,
    Ledger,
    check_entry,
    is_temporary,
)


def check_ledger(ledger: Ledger, head: str | None) -> list[str]:
    """Check a ledger that was just opened, which checked its base and its chain.

    Args:
        ledger: The ledger.
        head: One that was noted elsewhere, or None.

    Returns:
        What was checked, and what a crash left over, for people to read.

    Raises:
        ContributionError: The first thing that is wrong.
    """
    spec, state, roster, about = ledger.base.spec, ledger.state, ledger.roster, ledger.about
    done = [
        f"base {spec.id} {spec.version}: values match digest {ledger.base.digest[:12]}",
        f"chain: {len(ledger.entries)} entries, each signed by {about.coordinator} and linked",
        f"coordinator {fingerprint(about.coordinator, from_base64(about.key, ABOUT))}: is that the key that you know?",
        _check_head(ledger, head),
        *_check_names(ledger),
    ]
    for name in state.active:
        found = ledger.load(name, roster, contents=True)
        done.append(f"contribution {name[:12]} of site {found.site}: signature, files and values")
    for name in sorted(state.gone):
        folder = ledger.folder / CONTRIBUTIONS / name
        left = plain_names(folder, ALLOWED)
        manifest, _ = read_statement(folder, roster)
        check_entry(folder, manifest, state.known[name])
        done.append(f"contribution {name[:12]}: gone; manifest and signature")
        done += [f"contribution {name[:12]}: tensors left over from a crash, ignored"] * (len(left) > 2)
    return done


def _check_head(ledger: Ledger, head: str | None) -> str:
    if head is None:
        return "no head was given: a ledger put back to an older state can't be seen"
    if head not in ledger.heads:
        raise ContributionError(
            f"{ledger.folder}: the noted head {head[:12]} is not in the chain: the ledger was cut short, put back to "
            "an older state, or is another one."
        )
    return f"head {head[:12]} is entry {ledger.heads.index(head)} of {len(ledger.entries)}"


def _check_names(ledger: Ledger) -> list[str]:
    """Nothing unknown in the folder; what a crash left over is told."""
    left = []
    for path in sorted(ledger.folder.iterdir()):
        if path.name not in (ABOUT, ROSTER, CHAIN, BASE, CONTRIBUTIONS):
            if not is_temporary(path):
                raise ContributionError(f"{path} does not belong into a ledger.")
            left.append(f"{path.name}: left over from a crash, ignored")
    for path in sorted((ledger.folder / CONTRIBUTIONS).iterdir()):
        if path.name in ledger.state.known:
            continue
        if path.is_symlink() or not path.is_dir() or not (is_digest(path.name) or path.name.startswith(INCOMING)):
            raise ContributionError(f"{path} does not belong into a ledger.")
        left.append(f"{CONTRIBUTIONS}/{path.name[:21]}: left over from a crash, ignored")
    return left
