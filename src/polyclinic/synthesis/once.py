"""What a site answers once in an exchange.

Sums over two sets of sites differ by a site, where what is summed stays the same from round to round; measures of
candidates that a server may choose and change tell where patients lie. So a site answers such an op in one round, for
one message. A killed run asks the same again and gets the same.
"""

from __future__ import annotations

import json

from polyclinic.errors import SiteError
from polyclinic.federation.message import Message
from polyclinic.federation.site import Site
from polyclinic.files import whole_file

_JOURNAL = "answered.json"


def once(site: Site, op: str, message: Message) -> None:
    """Note that ``op`` is answered, before it is.

    Not in ``Site.state``: that forgets what a round wrote which the server begins anew.

    Args:
        site: Its folder keeps the journal.
        op: Name.
        message: What of the call must be the same when it is repeated.

    Raises:
        SiteError: It was answered in another round or for another message, or the journal is damaged.
    """
    path, call = site.state.folder / _JOURNAL, [site.round, message.digest()]
    try:
        journal = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        before = journal.get(op)
    except (ValueError, AttributeError) as error:
        raise SiteError(f"{path}: the journal of the exchange is damaged ({error}); nothing was sent.") from error
    if before is not None and before != call:
        raise SiteError(
            f"{op!r} was answered before, in another round or for another message. Together the answers would tell "
            "more than each, so nothing was sent. If the sites that take part have changed, start a new run."
        )
    if before is None:
        site.state.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps({**journal, op: call}).encode())
