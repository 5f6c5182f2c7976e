"""The masked sum: exact, whoever is lost; refused, whatever is altered; nothing of one site in what is seen."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parties import MODEL, STEPS, Consortium, Fault, consortium, random_arrays
from scipy import stats
from torch import Tensor
from toys import toy_study

from polyclinic.errors import ProtocolError, SiteError, StudyError
from polyclinic.federation.local import LocalChannel
from polyclinic.federation.message import Message
from polyclinic.federation.site import Leaf, Op
from polyclinic.secure.backends import check_cohort
from polyclinic.secure.hidden import AttemptFailed, Pending, own_lanes
from polyclinic.secure.identity import Identity
from polyclinic.secure.keystream import Cipher, Keystream
from polyclinic.secure.session import Attempt, Journal, Party
from polyclinic.secure.view import Recorder

PHASES = ("keys", "shares", "vector", "agree", "open")


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def threshold(sites: int) -> int:
    return sites * 2 // 3 + 1


def found(made: Consortium, purpose: str = "values") -> dict[int, list[int]]:
    return {bits: lanes.tolist() for bits, lanes in made.opened[purpose][1].lanes.items()}


def whose(made: Consortium, purpose: str = "values") -> list[str]:
    return list(made.opened[purpose][1].sites)


def check_exact(made: Consortium, contributors: list[str], asked: list[str] | None = None) -> None:
    assert whose(made) == contributors
    assert found(made) == made.by_hand(contributors, asked)


def again(made: Consortium, **other: Any) -> tuple[Attempt, Any]:
    """The sum of values once more, in a new attempt."""
    attempt, _ = made.opened["values"]
    attempt = replace(attempt, **{"number": attempt.number + 1, **other})
    layout = Pending.of(made.sites["a"]).layout
    return attempt, made.sums._protocol.add(made.channel, attempt, layout)


def nothing(site: str, message: Message) -> None:
    return None


def flip(*names: str) -> Callable[[str, Message], Message]:
    """Turns a bit in these arrays, or in all."""

    def change(site: str, message: Message) -> Message:
        arrays = dict(message.arrays)
        for name in names or arrays:
            arrays[name] = arrays[name].clone()
            arrays[name].view(torch.uint8)[-1] ^= 1
        return Message(arrays, message.scalars)

    return change


def say(**scalars: Any) -> Callable[[str, Message], Message]:
    return lambda _, m: Message(m.arrays, {**m.scalars, **scalars})


# Exact sums


@pytest.mark.parametrize("count", range(3, 17))
def test_the_sum_is_exact_and_keeps_the_stated_bound(tmp_path: Path, count: int) -> None:
    made = consortium(tmp_path, count)
    total = made.sum()
    check_exact(made, list(made.sites))
    assert found(made, "counts") == {64: [made.by_hand(list(made.sites))[64][0]]}
    assert total.weights == {"update": sum(made.weights.values())}
    mean, plain = total.mean("update"), made.mean(list(made.sites))
    for name, scale in STEPS.items():
        assert (mean[name] - plain[name]).abs().max() <= count * 0.5 / scale * (1 + 1e-6)
        assert mean[name].dtype == torch.float64
    assert total.scalars == {s: {"loss": 0.5} for s in made.sites}
    assert made.sums.incidents == []


SMALL = [
    (count, lost)
    for count in range(4, 8)
    for size in range(1, count - threshold(count) + 1)
    for lost in combinations("abcdefg"[:count], size)
]


@pytest.mark.parametrize(("count", "lost"), SMALL)
def test_every_set_of_few_sites_may_be_lost(tmp_path: Path, count: int, lost: tuple[str, ...]) -> None:
    made = consortium(tmp_path, count)
    made.meddle(Fault("masked-vector", nothing, lost))
    total = made.sum()
    left = [s for s in made.sites if s not in lost]
    check_exact(made, left)
    assert total.weights == {"update": sum(made.weights[s] for s in left)}
    plain, more = made.mean(left), sum(made.weights.values()) / sum(made.weights[s] for s in left)
    for name, mean in total.mean("update").items():
        assert (mean - plain[name]).abs().max() <= more * count * 0.5 / STEPS[name] * (1 + 1e-6)
    assert made.sums.incidents == []


class Rewinding(LocalChannel):
    """Lets sites go through keys, shares and vector once, and through agree and open as often as is asked."""

    lost: tuple[str, ...] = ()

    def stream(self, op: str, messages: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        if op in ("masked-keys", "masked-shares", "masked-vector"):
            kept = self.__dict__.setdefault("kept", {})
            if op not in kept:
                kept[op] = dict(super().stream(op, messages))
                letters = {s: dict(x.party._session.memory.get("letters", {})) for s, x in self._sites.items()}  # type: ignore[union-attr]
                self.__dict__["letters"] = letters
            yield from ((s, m) for s, m in kept[op].items() if op != "masked-vector" or s not in self.lost)
        else:
            for name in messages if op == "masked-agree" else ():
                party = self._sites[name].party
                session = party._session
                assert session is not None
                session.answered -= {"agree", "open"}
                session.memory["letters"] = dict(self.__dict__["letters"][name])
                party.journal._opened.clear()
            yield from super().stream(op, messages)


@pytest.mark.parametrize("count", range(8, 17))
def test_many_sites_of_many_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Sessions are rewound to ``vector``, from where on sets differ. All sets of up to 12 sites are tried.

    Beyond, all sets with one lost site and 30 drawn ones of each larger size; the next test has the rest.
    """
    made = consortium(tmp_path, count)
    made.sum()
    monkeypatch.setattr(Journal, "_write", lambda _: None)
    attempt, _ = made.opened["values"]
    layout = Pending.of(made.sites["a"]).layout
    made.channel = rewinding = Rewinding(made.sites)
    rewinding.begin_round(1)
    draw, names = np.random.default_rng(count), list(made.sites)
    for size in range(count - threshold(count) + 1):
        sets = list(combinations(names, size))
        if count > 12 and len(sets) > count:
            sets = [sets[i] for i in draw.choice(len(sets), 30, replace=False)]
        for lost in sets:
            rewinding.lost = lost
            made.sums._protocol.add(rewinding, replace(attempt, number=attempt.number + 1), layout)
            left = [s for s in names if s not in lost]
            check_exact(made, left)


@pytest.mark.parametrize("count", [13, 14, 15, 16])
def test_every_loss_that_the_threshold_allows_leaves_the_masks_that_shares_rebuild(tmp_path: Path, count: int) -> None:
    """The arithmetic of all 11,390 sets, with the keys that shares would rebuild (test_shamir) taken from the sites."""
    made = consortium(tmp_path, count)
    recorder = Recorder(made.channel)
    made.channel = recorder  # type: ignore[assignment]
    made.sum()
    names = sorted(made.sites)
    vectors = [seen.message for seen in recorder.seen if "lanes/32" in seen.message.arrays]
    masked = {n: m.arrays["lanes/32"].numpy().view(np.uint32) for n, m in zip(names, vectors, strict=True)}
    wide = len(vectors[0].arrays["lanes/64"]) * 8
    sessions = {name: made.sites[name].party._session for name in names}

    def stream(key: bytes, cipher: Cipher) -> np.ndarray:
        whole = np.empty(wide // 4 + masked["a"].size, np.uint32)
        Keystream(key, cipher).take(whole)
        return whole[wide // 4 :]

    own, pair = {}, {}
    for name, session in sessions.items():
        assert session is not None
        own[name] = stream(session.memory["own"], session.cipher)
        for peer in names[names.index(name) + 1 :]:
            pair[name, peer] = stream(session.pairs[peer], session.cipher)
    fixed = {name: made.fixed_sum([name], names)["32"] for name in names}
    tried = 0
    for size in range(count - threshold(count) + 1):
        for lost in combinations(names, size):
            left = [name for name in names if name not in lost]
            total = sum((masked[n] - own[n] for n in left), np.zeros_like(masked["a"]))
            for first, second in pair:
                if (first in lost) != (second in lost):
                    # The first of two adds their mask, the second subtracts it; one of them is not there.
                    total += pair[first, second] if first in lost else -pair[first, second]
            assert total.view(np.int32).tolist() == np.sum([fixed[n] for n in left], axis=0).tolist()
            tried += 1
    assert tried == {13: 1093, 14: 1471, 15: 1941, 16: 6885}[count]


def test_one_more_lost_site_than_the_threshold_allows_takes_a_fresh_attempt(tmp_path: Path) -> None:
    made = consortium(tmp_path, 5, aggregation={"backend": "masked", "fewest": 3})
    made.meddle(Fault("masked-vector", nothing, ("b", "d")))
    made.sum()
    check_exact(made, ["a", "c", "e"], asked=list("abcde"))
    (incident,) = made.sums.incidents
    assert incident == "train, values: only 3 of at least 4 sites (a, c, e) are left: the sum is not opened."


@pytest.mark.parametrize(("fewest", "wanted"), [(None, 7), (3, 3), (9, 9)])
def test_a_site_takes_no_part_among_a_few(tmp_path: Path, fewest: int | None, wanted: int) -> None:
    """Else a server with two sites on its side could ask these and a third, and subtract."""
    made = consortium(tmp_path, 10, aggregation={"backend": "masked", "fewest": fewest})
    made.sum()
    for count in range(3, 11):
        attempt = Attempt("train", "counts", 1, time.time_ns() // 1_000_000 + count, tuple("abcdefghij"[:count]))
        answer = made.sites["a"].handle("masked-keys", 1, attempt.message())
        said = f"only {count} of at least {wanted} sites"
        assert said in answer.scalars.get("refused", "") if count < wanted else "keys/mask" in answer.arrays


def test_the_same_sum_is_not_opened_with_other_totals(tmp_path: Path) -> None:
    """Two sums with other multiples of the same updates would have the difference of their multiples as difference."""
    made = consortium(tmp_path, 4)
    made.sum()
    (layout,) = {Pending.of(site).layout for site in made.sites.values()}
    total = sum(int(weight * 2**16) for weight in made.weights.values())
    for totals, opened in (((total,), True), ((total // 2,), False), ((total,), True)):
        attempt = Attempt("train", "values", 1, time.time_ns() // 1_000_000 + 10, tuple("abcd"), totals)
        time.sleep(0.02)
        if opened:
            assert made.sums._protocol.add(made.channel, attempt, layout).sites == tuple("abcd")
        else:
            with pytest.raises(AttemptFailed, match="opening it again with other totals of weights"):
                made.sums._protocol.add(made.channel, attempt, layout)


@pytest.mark.parametrize(("count", "lost"), [(3, ("b",)), (4, ("a", "c")), (5, ("a", "b", "c"))])
def test_two_that_are_left_are_refused_with_the_reason(tmp_path: Path, count: int, lost: tuple[str, ...]) -> None:
    made = consortium(tmp_path, count)
    made.meddle(Fault("masked-vector", nothing, lost))
    with pytest.raises(
        SiteError, match="no sum came about: only two sites .* each would find the other's update by subt"
    ):
        made.sum()


def test_extreme_values_and_weights_are_exact(tmp_path: Path) -> None:
    signs = {"a": 1, "b": 1, "c": 1, "d": -1}

    def extreme(name: str) -> dict[str, Tensor]:
        top = {"w": 128.0, "b": 64.0, "norm.running_var": 2.0**36}
        return {k: signs[name] * torch.full_like(t, top[k]) for k, t in MODEL.items()}

    made = consortium(tmp_path, {"a": 2.0**40, "b": 1.0, "c": 2.0**-16, "d": 2.0**40 - 1}, arrays=extreme)
    made.sum()
    check_exact(made, list("abcd"))
    assert found(made)[64][0] == 2**56 + 2**16 + 1 + 2**56 - 2**16


def test_sites_of_no_weight_are_hidden_too(tmp_path: Path) -> None:
    made = consortium(tmp_path, {"a": 0.0, "b": 3.0, "c": 0.0})
    total = made.sum()
    check_exact(made, list("abc"))
    assert (total.mean("update")["w"] - made.arrays["b"]["w"]).abs().max() < 1e-6
    made = consortium(tmp_path / "none", dict.fromkeys("abc", 0.0))
    with pytest.raises(SiteError, match="add up to zero"):
        made.sum().mean("update")


def test_running_statistics_survive(tmp_path: Path) -> None:
    """Variances of 1e3 beside weights of 1e-2: neither wraps nor loses the other's precision."""
    made = consortium(
        tmp_path, 6, arrays=lambda s: {**random_arrays(s), "norm.running_var": torch.full((4,), 1234.567)}
    )
    mean = made.sum().mean("update")
    assert (mean["norm.running_var"] - torch.tensor(1234.567).double()).abs().max() < 6 * 2.0**-27
    assert (mean["w"] - made.mean(list(made.sites))["w"]).abs().max() < 6 * 2.0**-24


def flat(made: Consortium, **arrays: Any) -> None:
    for name in made.sites:
        made.arrays[name] = {k: torch.full_like(t, arrays.get(name, 0.0)) for k, t in MODEL.items()}


@pytest.mark.parametrize("lost", [(), ("b",)])
def test_16_bit_lanes_are_exact_sums_of_what_sites_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, ...]
) -> None:
    sent: dict[str, Any] = {}

    def watched(site: Any, session: Any) -> Any:
        lanes = own_lanes(site, session)
        if session.attempt.purpose == "values":
            sent[site.name] = {bits: part.tolist() for bits, part in lanes.items()}
        return lanes

    monkeypatch.setattr("polyclinic.secure.masked.own_lanes", watched)
    made = consortium(tmp_path, 5, aggregation={"backend": "masked", "lanes": 16})
    made.meddle(Fault("masked-vector", nothing, lost, attempts=bool(lost)))
    total = made.sum()
    left = [s for s in made.sites if s not in lost]
    assert whose(made) == left
    assert found(made) == {
        bits: [sum(x) for x in zip(*(sent[s][bits] for s in left), strict=True)] for bits in (64, 16)
    }
    more = sum(made.weights.values()) / sum(made.weights[s] for s in left)
    plain = made.mean(left)
    for name, base in {"w": 0.5, "b": 0.25}.items():
        assert (total.mean("update")[name] - plain[name]).abs().max() <= more * 5 * base / (2**15 - 6)


def test_16_bit_lanes_halve_what_is_sent(tmp_path: Path) -> None:
    sizes = {}
    for lanes in (16, 32):
        made = consortium(tmp_path / str(lanes), 3, aggregation={"backend": "masked", "lanes": lanes})
        recorder = Recorder(made.channel)
        made.channel = recorder  # type: ignore[assignment]
        made.sum()
        (last,) = [s for s in recorder.seen if s.op == "masked-vector" and s.sender == "a"][1:]
        sizes[lanes] = (
            last.message.arrays[f"lanes/{lanes}"].numel() * last.message.arrays[f"lanes/{lanes}"].element_size()
        )
    assert sizes == {16: 44, 32: 88}


def test_what_16_bit_lanes_cut_arrives_later(tmp_path: Path) -> None:
    """A value of 1.2 where 0.5 is carried: it takes three rounds; the others go on as usual."""
    made = consortium(tmp_path, 4, aggregation={"backend": "masked", "lanes": 16})
    share = made.weights["b"] / sum(made.weights.values())
    means = []
    for number, value in enumerate([1.2, 0.0, 0.0, 0.0], 1):
        flat(made, b=value)
        means.append(made.sum(number).mean("update")["w"])
    bound = 4 * 0.5 / (2**15 - 5)
    for mean, wanted in zip(means, (0.5, 0.5, 0.2, 0.0), strict=True):
        assert (mean - share * wanted).abs().max() <= 2 * bound
    assert (sum(means) - share * 1.2).abs().max() <= bound


def test_error_feedback_leaves_no_drift(tmp_path: Path) -> None:
    made = consortium(tmp_path, 3, aggregation={"backend": "masked", "lanes": 16})
    sums = {name: torch.zeros(MODEL[name].shape, dtype=torch.float64) for name in ("w", "b")}
    rounds = 25
    for number in range(1, rounds + 1):
        for name, mean in made.sum(number).mean("update").items():
            if name in sums:
                sums[name] += mean
    plain = made.mean(list(made.sites))
    for name, base in {"w": 0.5, "b": 0.25}.items():
        # What is not sent yet is less than a step at each site, after however many rounds.
        assert (sums[name] - rounds * plain[name]).abs().max() <= 3 * base / (2**15 - 4) + 1e-6


# A site is lost at each phase


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("purpose", ["counts", "values"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_site_is_lost_at_each_phase(tmp_path: Path, phase: str, purpose: str, up: bool) -> None:
    made = consortium(tmp_path, 4)
    made.meddle(Fault(f"masked-{phase}", nothing, ("c",), purpose, up=up, attempts=9))
    total = made.sum()
    arrived = phase in ("agree", "open")
    # Lost in the counts, it is not asked for values, unless its weight was counted.
    left = list("abcd") if arrived else list("abd")
    assert whose(made, purpose) == left
    asked = list("abd") if purpose == "counts" and not arrived else list("abcd")
    check_exact(made, left, asked)
    assert total.weights == {"update": sum(made.weights[s] for s in left)}
    assert made.sums.incidents == []


def test_a_site_that_does_not_answer_the_op_is_left_out(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.meddle(Fault("train", nothing, ("d",), up=False))
    made.sum()
    check_exact(made, list("abc"), asked=list("abc"))


@pytest.mark.parametrize(("lost", "reason"), [("abc", "only 1 of at least 3"), ("ab", "subtracting its own from the")])
def test_two_sites_that_answer_are_refused_before_any_sum(tmp_path: Path, lost: str, reason: str) -> None:
    made = consortium(tmp_path, 4)
    made.meddle(Fault("train", nothing, tuple(lost), up=False))
    with pytest.raises(SiteError, match=reason):
        made.sum()
    assert made.opened == {}


def test_two_sites_are_refused_with_the_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="each would find the other's update by subtracting its own from the sum"):
        consortium(tmp_path, 2)


def test_two_sites_are_refused_by_the_sites_themselves(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.sum()
    with pytest.raises(
        AttemptFailed, match="site 'a' refused 'masked-keys': only two sites .a, b. are left: each"
    ) as no:
        again(made, sites=("a", "b"))
    assert set(no.value.refused) == {"a", "b"}


@pytest.mark.parametrize(
    ("backend", "sites", "participation", "reason"),
    [
        ("masked", 2, 1.0, "two sites take part in a round, and each would find the other's update"),
        ("masked", 4, 0.5, "two sites take part"),
        ("ring-he", 2, 1.0, "two sites take part"),
        ("masked", 1, 1.0, "1 of 1 sites take part in a round; a secure sum needs 3 to 16"),
        ("masked", 17, 1.0, "17 of 17 sites"),
        ("masked", 3, 1.0, ""),
        ("masked", 16, 1.0, ""),
        ("masked", 32, 0.5, ""),
        ("plain", 2, 1.0, ""),
    ],
)
def test_a_study_is_refused_for_its_cohort(backend: str, sites: int, participation: float, reason: str) -> None:
    study = toy_study({"name": "fedavg", "participation": participation}, aggregation={"backend": backend})
    ops = {"train": Op(lambda _, m: m, (Leaf("update", "sum", "images"),))}
    method: Any = SimpleNamespace(simulation_only=False, ops=lambda: ops)
    if reason:
        with pytest.raises(StudyError, match=reason):
            check_cohort(study, method, sites)
    else:
        check_cohort(study, method, sites)
    method.simulation_only = True
    check_cohort(study, method, sites)
    ops["train"] = Op(lambda _, m: m, ())
    method.simulation_only = False
    check_cohort(study, method, sites)


# Replays


def test_a_replayed_attempt_is_refused_by_every_site(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.sum()
    number = made.opened["values"][0].number
    for old in (number, number - 1):
        with pytest.raises(AttemptFailed, match=f"attempt {old} is a replay: attempt {number} was seen") as refused:
            again(made, number=old)
        assert set(refused.value.refused) == set("abcd")


def test_a_replayed_round_is_refused_by_every_site(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.sum(2)
    with pytest.raises(AttemptFailed, match="a sum of round 1 was asked for in round 2"):
        again(made, round=1)
    with pytest.raises(SiteError, match="round 1 is a replay: round 2 has begun"):
        made.sum(1)
    made.sum(3)
    check_exact(made, list("abcd"))


def test_a_resumed_round_opens_the_same_set_and_no_other(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.sum()
    first = found(made)
    again(made)
    assert found(made) == first
    made.meddle(Fault("masked-vector", nothing, ("d",), attempts=2))
    made.channel.begin_round(1)
    with pytest.raises(AttemptFailed, match="was opened for a, b, c, d; opening it again for a, b, c would give"):
        again(made)
    with pytest.raises(SiteError, match="opening it again for a, b, c would give away the difference"):
        made.sum()
    made.sum(2)
    check_exact(made, list("abcd"))


def test_counts_are_opened_for_one_set_too(tmp_path: Path) -> None:
    """Else the weight of the one left out would be the difference."""
    made = consortium(tmp_path, 4)
    made.sum()
    made.meddle(Fault("train", nothing, ("d",), up=False))
    with pytest.raises(
        SiteError, match="counts of train in round 1 was opened for a, b, c, d; opening it again for a, b"
    ):
        made.sum()


def test_a_restarted_site_is_left_behind_and_back_in_the_next_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)

    def restart(site: str, message: Message) -> Message:
        del made.sites[site].party
        return message

    made.meddle(Fault("masked-vector", restart, ("b",), up=False))
    made.sum()
    check_exact(made, list("acd"), asked=list("abcd"))
    assert "site 'b' refused 'masked-vector': attempt" in made.sums.incidents[0]
    assert "this site restarted" in made.sums.incidents[0]
    made.sum(2)
    check_exact(made, list("abcd"))


# Others' fault: refused, and the round goes on in a fresh attempt


def foreign_roster(made: Consortium, site: str) -> None:
    own = made.sites[site]._credentials
    assert own is not None
    roster = replace(own.roster, keys={**own.roster.keys, "a": Identity.new("a").public})
    made.sites[site]._credentials = replace(own, roster=roster)


def test_a_foreign_roster_is_refused(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    foreign_roster(made, "d")
    made.sum()
    check_exact(made, list("abc"), asked=list("abc"))
    assert all("site 'd' works with another roster than this site" in text for text in made.sums.incidents)
    made.sum(2)
    with pytest.raises(AttemptFailed, match="'zealand' is not on the roster"):
        again(made, sites=("a", "b", "c", "zealand"))


def other_model(site: str, message: Message) -> Message:
    return Message({**message.arrays, "model/w": message.arrays["model/w"] * 0.99}, message.scalars)


def test_a_site_that_got_another_model_is_refused(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.meddle(Fault("train", other_model, ("d",), up=False))
    made.sum()
    check_exact(made, list("abc"), asked=list("abc"))
    assert len(made.sums.incidents) == 2, "the second attempt had the same sites"
    for who, of in (("a", "d"), ("b", "d"), ("c", "d"), ("d", "a")):
        assert f"site {who!r} refused 'masked-shares': site {of!r} works with another model" in made.sums.incidents[0]


def test_no_sum_comes_about_where_all_got_other_models(tmp_path: Path) -> None:
    made = consortium(tmp_path, 3)
    made.meddle(Fault("train", other_model, ("b",), up=False))
    with pytest.raises(
        SiteError, match="no sum came about: site 'a' refused 'masked-shares': site 'b' works with another"
    ):
        made.sum()
    assert made.opened == {}


@pytest.mark.parametrize("purpose", ["counts", "values"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            Fault("masked-shares", flip("b/keys/mask"), up=False),
            "site 'a' refused 'masked-shares': the signature of site 'b' is wrong",
        ),
        (Fault("masked-keys", flip("keys/seal"), ("b",)), "the signature of site 'b' is wrong"),
        (Fault("masked-keys", say(context="{}"), ("b",)), "site 'b' works with another"),
        (
            Fault("masked-shares", flip("shares/c"), ("b",)),
            "site 'c' refused 'masked-vector': what site 'b' sealed for this site was altered on its way",
        ),
        (
            Fault("masked-vector", flip("shares/b"), ("c",), up=False),
            "site 'c' refused 'masked-vector': what site 'b' sealed for this site was altered on its way",
        ),
        (
            Fault("masked-shares", lambda _, m: Message({}, m.scalars), ("b",)),
            "the shares of site 'b' are incomplete",
        ),
        (
            Fault("masked-vector", flip("lanes/64"), ("b",)),
            "the server refused the masked vector of site 'b': the signature of site 'b' is wrong",
        ),
        (Fault("masked-vector", flip("signed/vector"), ("b",)), "the server refused the masked vector of site 'b'"),
        (
            Fault("masked-vector", lambda _, m: Message({"lanes/64": torch.ones(1)}, {}), ("b",)),
            "a vector has other lanes than the layout says",
        ),
        (
            Fault("masked-vector", lambda _, m: Message({"lanes/x": torch.ones(1)}, {}), ("b",)),
            "a vector has other lanes than the layout says",
        ),
        (
            Fault("masked-vector", lambda _, m: Message({k: a.double() for k, a in m.arrays.items()}, {}), ("b",)),
            "a vector has other lanes than the layout says",
        ),
        (
            Fault("masked-vector", lambda _, m: Message(scalars={"refused": "no"}), ("b",)),
            "site 'b' refused 'masked-vector': no",
        ),
        (Fault("masked-agree", say(arrived="[]"), up=False), "holds others than those that were asked"),
        (Fault("masked-agree", say(arrived='["a","b","c"]'), up=False), "site 'd' refused 'masked-agree': the list of"),
        (Fault("masked-agree", say(arrived='["a","b","c","d","e"]'), up=False), "holds others than those that were"),
        (Fault("masked-agree", say(arrived='["a","c","b","d"]'), up=False), "is not sorted or names one twice"),
        (Fault("masked-agree", say(arrived='["a","b","c","d","d"]'), up=False), "is not sorted or names one twice"),
        (Fault("masked-agree", say(arrived='["a","b"]'), ("a", "b"), up=False), "only two sites .a, b. are left"),
        (Fault("masked-agree", say(arrived="a"), up=False), "the call holds no list 'arrived'"),
        (Fault("masked-agree", say(arrived="7"), up=False), "the call holds no list 'arrived'"),
        (
            Fault("masked-agree", flip("signed/arrived"), ("b",)),
            "site 'a' refused 'masked-open': the signature of site 'b' is wrong",
        ),
        (
            Fault(
                "masked-open",
                lambda _, m: Message({"a/signed/other": m.arrays["a/signed/arrived"]}, m.scalars),
                up=False,
            ),
            "0 sites signed the list of those whose vector arrived, and 3 must",
        ),
        (Fault("masked-open", flip(), ("b",)), "the shares that sites opened are of no use: the shares .* do not fit"),
        (
            Fault("masked-open", lambda _, m: Message({}, m.scalars), ("b",)),
            "the shares that sites opened are of no use: 'own/a'",
        ),
    ],
)
def test_what_was_altered_once_is_refused_and_the_next_attempt_succeeds(
    tmp_path: Path, fault: Fault, reason: str, purpose: str
) -> None:
    made = consortium(tmp_path, 4)
    made.meddle(replace(fault, purpose=purpose, numbers=set()))
    made.sum()
    check_exact(made, list("abcd"))
    (incident,) = made.sums.incidents
    assert incident.startswith(f"train, {purpose}: ")
    assert re.search(reason, incident), incident


@pytest.mark.parametrize(
    "fault",
    [
        Fault("masked-keys", flip("keys/mask"), ("c",), attempts=9),
        Fault("masked-shares", flip(), ("c",), attempts=9),
        Fault("masked-vector", flip("signed/vector"), ("c",), attempts=9),
        Fault("masked-vector", lambda _, m: Message({}, {}), ("c",), attempts=9),
        Fault("masked-shares", lambda _, m: Message({}, {}), ("c",), attempts=9),
        Fault("masked-shares", say(refused="cannot", blames=""), ("c",), attempts=9),
    ],
)
def test_a_site_whose_messages_are_always_altered_is_left_out(tmp_path: Path, fault: Fault) -> None:
    made = consortium(tmp_path, 5)
    made.meddle(replace(fault, numbers=set()))
    made.sum()
    check_exact(made, list("abde"), asked=list("abcde"))
    assert len(made.sums.incidents) == 2


def test_a_site_that_deals_out_too_little_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = consortium(tmp_path, 4)
    party = made.sites["b"].party
    monkeypatch.setattr(party, "seal", lambda session, peer, secret: Party.seal(party, session, peer, secret[:-66]))
    made.sum()
    check_exact(made, list("acd"), asked=list("acd"))
    for site in "acd":
        assert f"site {site!r} refused 'masked-vector': site 'b' sealed 198 bytes of shares" in made.sums.incidents[0]


def test_a_fault_that_does_not_end_ends_the_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.meddle(Fault("masked-open", flip(), ("b",), attempts=9))
    with pytest.raises(
        SiteError, match="'train', round 1: no sum came about: the shares that sites opened are of no use"
    ):
        made.sum()
    assert len(made.sums.incidents) == 2
    assert list(made.opened) == ["counts"]


def test_two_lists_are_opened_by_nobody(tmp_path: Path) -> None:
    """A server that tells half of the sites of another list cannot get t signatures under either."""
    made = consortium(tmp_path, 5)
    lists = {s: list("abcd") if s in "ab" else list("bcde") for s in "abcde"}

    def two(site: str, message: Message) -> Message:
        return Message(message.arrays, {**message.scalars, "arrived": json.dumps(lists[site])})

    def fitting(site: str, message: Message) -> Message:
        arrays = {k: a for k, a in message.arrays.items() if lists[k[0]] == lists[site]}
        return Message(arrays, message.scalars)

    made.meddle(Fault("masked-agree", two, up=False), Fault("masked-open", fitting, up=False))
    made.sum()
    (incident,) = made.sums.incidents
    assert (
        "site 'a' refused 'masked-open': 2 sites signed the list of those whose vector arrived, and 4 must" in incident
    )
    assert "site 'e' refused 'masked-open': 3 sites signed the list" in incident
    made.meddle(Fault("masked-agree", two, up=False))
    made.sum(2)
    assert "site 'a' refused 'masked-open': the signature of site 'c' is wrong" in made.sums.incidents[-1]
    check_exact(made, list("abcde"))


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_second_answer_in_one_attempt_is_refused(tmp_path: Path, phase: str) -> None:
    made = consortium(tmp_path, 4)
    said = []

    def twice(site: str, message: Message) -> Message:
        reply = made.sites[site].handle(f"masked-{phase}", 1, message)
        assert "refused" not in reply.scalars
        other = Message(message.arrays, {**message.scalars, "arrived": '["a","b","c"]'})
        said.append(made.sites[site].handle(f"masked-{phase}", 1, other).scalars)
        return message

    made.meddle(Fault(f"masked-{phase}", twice, ("b",), up=False))
    made.sum()
    assert len(said) == 1
    assert str(said[0]["refused"]).startswith(f"{phase!r} was answered in attempt ")
    assert f"{phase!r} was answered in attempt" in made.sums.incidents[0] if made.sums.incidents else phase == "open"


@pytest.mark.parametrize("phase", ["vector", "agree", "open"])
def test_a_phase_before_its_turn_is_refused(tmp_path: Path, phase: str) -> None:
    made = consortium(tmp_path, 4)
    replies = []

    def early(site: str, message: Message) -> Message:
        call = Message({}, {**message.scalars, "arrived": '["a","b","c"]'})
        replies.append(made.sites[site].handle(f"masked-{phase}", 1, call))
        return message

    made.meddle(Fault("masked-shares", early, ("b",), up=False))
    made.sum()
    (reply,) = replies
    assert not reply.arrays
    wanted = {"vector": "only 1 of at least 3 sites", "agree": "holds others than", "open": "has signed no list"}
    assert wanted[phase] in str(reply.scalars["refused"])


def test_who_sent_no_vector_signs_no_list(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.arrays["a"]["b"][3] = 100.0
    replies = []

    def ask_both(site: str, message: Message) -> Message:
        replies.append(made.sites[site].handle("masked-vector", 1, message))
        call = Message({}, {**message.scalars, "arrived": '["a","b","c","d"]'})
        replies.append(made.sites[site].handle("masked-agree", 1, call))
        return message

    made.meddle(Fault("masked-vector", ask_both, ("a",), up=False))
    made.sum()
    assert "nothing was sent" in str(replies[0].scalars["refused"])
    assert "holds others than those that were asked" in str(replies[1].scalars["refused"])


def test_an_overflow_is_refused_by_its_site_before_anything_is_sent(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.arrays["d"]["b"][3] = 717.25
    made.channel = recorder = Recorder(made.channel)  # type: ignore[assignment]
    made.sum()
    check_exact(made, list("abc"), asked=list("abcd"))
    assert (
        "site 'd' refused 'masked-vector': update/b holds a value that is not finite or beyond 64"
        in made.sums.incidents[0]
    )
    vectors = [s for s in recorder.seen if s.op == "masked-vector" and s.sender == "d"]
    assert [list(s.message.arrays) for s in vectors[1:]] == [[], []]
    # Three digits alone turn up by chance in keys and digests.
    assert not any("717.2" in str(s.message.scalars) for s in recorder.seen)


def test_other_shapes_name_the_sites(tmp_path: Path) -> None:
    made = consortium(tmp_path, 3)
    made.arrays["b"]["w"] = torch.zeros(5, 3)
    with pytest.raises(SiteError, match=r"site 'b' answered update/w with shape \(5, 3\), site 'a' with \(3, 5\)"):
        made.sum()


# What is seen


def forms(weight: int) -> list[bytes]:
    """A number as it could stand in a message, in four bytes or more."""
    steps = weight * 65536
    packed = [
        struct.pack(f, x)
        for f in ("<i", "<q", "<f", "<d", ">i", ">q")
        for x in (weight, steps)
        if f[1] != "i" or x < 2**31
    ]
    return [*packed, str(weight).encode(), str(steps).encode()]


def seen_in(message: Message, weight: int) -> bool:
    data = message.to_bytes()
    return any(form in data for form in forms(weight)) or float(weight) in [
        v for v in message.scalars.values() if v is not True
    ]


def test_sample_counts_never_travel_in_clear(tmp_path: Path) -> None:
    weights = {"a": 918_273, "b": 564_738, "c": 1_029_385, "d": 475_869}
    made = consortium(tmp_path, {s: float(w) for s, w in weights.items()})
    made.channel = recorder = Recorder(made.channel)  # type: ignore[assignment]
    made.sum()
    assert len(recorder.seen) == 2 * 4 * 11
    for seen in recorder.seen:
        assert not [w for w in weights.values() if seen_in(seen.message, w)], seen.op
    assert any(seen_in(seen.message, sum(weights.values())) for seen in recorder.seen), (
        "their sum is known, so this scan can see"
    )
    for form in (
        Message(scalars={"weight/update": 918_273.0}),
        Message({"x/y": torch.tensor([918_273])}),
        Message({"x/y": torch.tensor([918_273], dtype=torch.int32)}),
        Message({"x/y": torch.tensor([918_273.0])}),
        Message({"x/y": torch.tensor([918_273 << 16])}),
        Message(scalars={"x": "[918273]"}),
    ):
        assert seen_in(form, 918_273)


BIG = {"w": torch.full((20_001,), 0.5)}


def uniform(lanes: Tensor) -> float:
    """p of a chi-square test of the bytes against all being equally likely."""
    counts = np.bincount(lanes.contiguous().view(torch.uint8).numpy(), minlength=256)
    return float(stats.chisquare(counts).pvalue)


def vectors(
    folder: Path, move: float = 0.0, rounds: int = 1, bits: int = 32
) -> tuple[list[Any], list[dict[str, Tensor]], Tensor]:
    """What the server sees with ``move`` shifted from b to a, the masked vectors by site, and the mean."""

    def arrays(name: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(ord(name))
        shift = {"a": move, "b": -move}.get(name, 0.0)
        return {"w": 0.02 * torch.randn(20_001, generator=draw).double() + shift}

    made = consortium(
        folder, dict.fromkeys("abcd", 1.0), arrays=arrays, aggregation={"backend": "masked", "lanes": bits}
    )
    made.channel = recorder = Recorder(made.channel)  # type: ignore[assignment]
    masked = []
    for number in range(1, rounds + 1):
        recorder.seen.clear()
        mean = made.sum(number, BIG).mean("update")["w"]
        masked.append(
            {s.sender: s.message.arrays[f"lanes/{bits}"] for s in recorder.seen if f"lanes/{bits}" in s.message.arrays}
        )
    return recorder.view("server"), masked, mean


@pytest.mark.parametrize("bits", [16, 32])
def test_a_masked_vector_looks_uniform_whatever_is_in_it(tmp_path: Path, bits: int) -> None:
    """Fixed alpha of 1e-6 for each of 20 tests: one false alarm in 50,000 runs."""
    still, (first, second), mean = vectors(tmp_path / "still", rounds=2, bits=bits)
    moved, (other,), moved_mean = vectors(tmp_path / "moved", move=0.1, bits=bits)

    assert (mean - moved_mean).abs().max() <= 8 * 0.5 / 2**13, (
        "the sum is the same, so the server learns nothing from it"
    )
    shapes = [
        [
            (s.op, s.sender, s.receiver, sorted((k, tuple(a.shape), a.dtype) for k, a in s.message.arrays.items()))
            for s in view
        ]
        for view in (still, moved)
    ]
    assert shapes[0] == shapes[1]
    for site in "abcd":
        assert uniform(first[site]) > 1e-6
        assert uniform(other[site]) > 1e-6
        assert uniform(first[site] - second[site]) > 1e-6, "two rounds of one input share no mask"
        assert uniform(first[site] - other[site]) > 1e-6
    assert uniform(first["a"] + first["b"]) > 1e-6, "not all of their masks cancel"
    assert uniform((mean * 2**20).to(torch.int32)) < 1e-6, "the test can tell"


def test_no_site_sees_another_s_vector(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.channel = recorder = Recorder(made.channel)  # type: ignore[assignment]
    made.sum()
    for seen in recorder.seen:
        if seen.receiver != "server" and seen.op.startswith("masked"):
            assert not [name for name in seen.message.arrays if "lanes" in name]
    opened = [s for s in recorder.seen if s.op == "masked-open" and s.sender != "server"]
    assert {tuple(s.message.groups()) for s in opened} == {("own",)}, "no mask of a pair was told, as none was lost"


def test_of_each_peer_one_kind_of_share_is_told(tmp_path: Path) -> None:
    made = consortium(tmp_path, 7)
    made.meddle(Fault("masked-vector", nothing, ("b", "f")))
    made.channel = recorder = Recorder(made.channel)  # type: ignore[assignment]
    made.sum()
    told = [s.message for s in recorder.seen if s.op == "masked-open" and s.sender != "server"][-5:]
    for reply in told:
        assert set(reply.group("own")) == set("acdeg")
        assert set(reply.group("shared")) == {f"{gone}/{peer}" for gone in "bf" for peer in "acdeg"}


# Secrets that pairs of sites have beforehand


def give_secret(made: Consortium, one: str, other: str, *, to: str = "") -> None:
    for site, peer in ((one, other), (other, one)):
        own = made.sites[site]._credentials
        assert own is not None
        if site in (to or site):
            made.sites[site]._credentials = replace(own, pair_secrets={**own.pair_secrets, peer: b"k" * 32})


@pytest.mark.parametrize("lost", [(), ("a",), ("d",)])
def test_a_sum_with_secrets_of_pairs_is_exact(tmp_path: Path, lost: tuple[str, ...]) -> None:
    made = consortium(tmp_path, 4)
    give_secret(made, "a", "b")
    give_secret(made, "a", "d")
    made.meddle(Fault("masked-vector", nothing, lost, attempts=bool(lost)))
    made.sum()
    check_exact(made, [s for s in "abcd" if s not in lost])
    assert made.sums.incidents == []


def test_a_secret_that_only_one_of_a_pair_has_is_refused(tmp_path: Path) -> None:
    made = consortium(tmp_path, 3)
    give_secret(made, "a", "b", to="a")
    with pytest.raises(
        SiteError, match="site 'a' refused 'masked-shares': site 'b' has another pair secret than this site"
    ):
        made.sum()


def test_a_site_without_a_key_says_so(tmp_path: Path) -> None:
    made = consortium(tmp_path, 3)
    made.sites["b"]._credentials = None
    with pytest.raises(SiteError, match="b: SiteError: site 'b' has no key for secure sums"):
        made.sum()


def test_more_sums_of_weights_than_groups_are_refused(tmp_path: Path) -> None:
    made = consortium(tmp_path, 4)
    made.sum()
    with pytest.raises(AttemptFailed, match="the call says 2 sums of weights, and there are 1"):
        again(made, totals=(1 << 20, 1 << 20))


def test_a_weight_that_cannot_be_summed_is_not_told(tmp_path: Path) -> None:
    made = consortium(tmp_path, {"a": 1.0, "b": 2.0, "c": -31.5, "d": 4.0})
    made.sum()
    check_exact(made, list("abd"), asked=list("abd"))
    assert "weight cannot be summed" in made.channel.absent["c"]
    assert "31.5" not in made.channel.absent["c"]
    assert issubclass(ProtocolError, SiteError)
