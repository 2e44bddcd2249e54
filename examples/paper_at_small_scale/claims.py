"""The claims, each as tests over the results and a rule over the tests' verdicts. The rules were written before the runs.

A test is a mean change with its error (`inference`), named by what it is about. A rule sees the corrected verdicts alone, so it is a pure
function of few words. Claims of methods go by the difference of the methods, not by two verdicts that are not alike.

Changes are in standard deviations of a video before training. "The rest" are the measures that a run is not trained on and of which more
is better: other rewards, held-out metrics, diversity. They are judged one by one, because their spreads differ too much for a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from inference import Estimate, Tested, Verdict, crossed, family, independent
from plan import JUDGED, KINDS, PARTS, judged_by
from raw import CAPTION, GAIN, NEUTRAL, Results

MARGIN = 0.2
"""Standard deviations of a video: a change within it is called equivalent to none."""
Finding = Literal["holds", "in part", "not shown", "opposite", "no verdict", "not run"]
Verdicts = Mapping[str, Verdict]
Tests = dict[str, Estimate]


@dataclass(frozen=True)
class Claim:
    """title: in a few words. source: who says so, and where. needs: parts and methods without which it was not run.

    ratio: estimates are logarithms of ratios.
    """

    title: str
    source: str
    needs: tuple[tuple[str, str], ...]
    tests: Callable[[Results], Tests]
    rule: Callable[[Verdicts], Finding]
    ratio: bool = False


@dataclass(frozen=True)
class Outcome:
    """A claim, the tests it goes by, and what they come to."""

    claim: Claim
    tests: dict[str, Tested]
    verdict: Finding

    @property
    def title(self) -> str:
        """Return the claim's."""
        return self.claim.title


def judge(results: Results) -> list[Outcome]:
    """Return every claim with its verdict. All tests of all claims that were run are one family."""
    tests = {claim.title: claim.tests(results) if has(results, claim) else {} for claim in CLAIMS}
    whole = family({f"{title}|{name}": test for title, named in tests.items() for name, test in named.items()}, MARGIN)
    outcomes = []
    for claim in CLAIMS:
        own = {name: whole[f"{claim.title}|{name}"] for name in tests[claim.title]}
        verdicts = {name: test.verdict for name, test in own.items()}
        if not own:
            outcomes.append(Outcome(claim, {}, "not run"))
        else:
            outcomes.append(Outcome(claim, own, "no verdict" if "too few" in verdicts.values() else claim.rule(verdicts)))
    return outcomes


def has(results: Results, claim: Claim) -> bool:
    """Return whether all that a claim needs was run."""
    return all(method in results.methods(part) or method in results.parts.get(part, {}).get("entropy", ()) for part, method in claim.needs)


# Tests -----------------------------------------------------------------------------------------------------------------------------

Where = tuple[str, str]


def change(results: Results, where: Where, measure: str = GAIN) -> Estimate:
    """Return how a measure of a part's method changes."""
    return crossed(results.changes(*where, measure))


def difference(results: Results, first: Where, second: Where, measure: str = GAIN) -> Estimate:
    """Return how much more the first changes than the second, seed by seed and prompt by prompt, each in its own standard deviations."""
    return crossed(results.changes(*first, measure) - results.changes(*second, measure))


def rest(results: Results, where: Where) -> list[str]:
    """Return the measures beside the caption reward of which more is better."""
    return [name for name in results.measures(*where) if name not in (GAIN, CAPTION, *NEUTRAL)]


def contest(first: Where, second: Where) -> Callable[[Results], Tests]:
    """Return the gains of two methods, and their difference."""
    return lambda results: {
        FIRST: change(results, first),
        SECOND: change(results, second),
        MORE: difference(results, first, second),
    }


FIRST, SECOND, MORE = "the first", "the second", "the first minus the second"


def by_pivot(method: str) -> Callable[[Results], Tests]:
    """Return, of each pivot, the logarithm of the frames' change by the initial noise over that by the re-noise that matters most."""

    def tests(results: Results) -> Tests:
        records = results.parts["entropy"]["entropy"][method]
        found = {}
        for pivot in sorted({record["pivot"] for record in records}):
            of_pivot = [record["frames"] for record in records if record["pivot"] == pivot]
            changes = {name: np.array([np.mean(frames[name]) for frames in of_pivot]) for name in of_pivot[0]}
            initial = changes.pop("initial")
            largest = max(changes.values(), key=lambda values: float(values.mean()))
            found[f"pivot {pivot}"] = independent(np.log(initial / largest))
        return found

    return tests


ON, SEMI, OFF = (("caption", f"caption_{mode}") for mode in ("on", "semi", "off"))


def hacking(results: Results) -> Tests:
    """Return the caption reward and the rest of both, and the difference in the rest."""
    found = {"on-policy: caption": change(results, ON, CAPTION), "semi: caption": change(results, SEMI, CAPTION)}
    for name in rest(results, ON):
        found[f"on-policy: {name}"] = change(results, ON, name)
        found[f"semi: {name}"] = change(results, SEMI, name)
        found[f"semi minus on-policy: {name}"] = difference(results, SEMI, ON, name)
    return found


def collapse(results: Results) -> Tests:
    """Return what off-policy training does to the caption reward and the rest, and how it differs from semi-on-policy in the former."""
    found = {
        "off-policy: caption": change(results, OFF, CAPTION),
        "off-policy minus semi: caption": difference(results, OFF, SEMI, CAPTION),
    }
    return found | {f"off-policy: {name}": change(results, OFF, name) for name in rest(results, OFF)}


def merge(results: Results) -> Tests:
    """Return the slope over the scale of the merge, by least squares: of the gain, and of each metric that no adapter was trained on."""
    document = results.parts["caption"]
    scales = np.array(document["plan"]["scales"])
    weights = (scales - scales.mean()) / np.square(scales - scales.mean()).sum()

    def slope(measure: str) -> Estimate:
        cells = [results.changes("caption", f"merge_{scale:g}", measure) for scale in scales]
        return crossed(np.tensordot(weights, np.array(cells), axes=1))

    outside = [name for name in results.measures("caption", f"merge_{scales[0]:g}") if name != GAIN and name not in document["weights"]]
    return {"in-domain: gain": slope(GAIN)} | {f"out-of-domain: {name}": slope(name) for name in outside if name not in NEUTRAL}


# Rules -----------------------------------------------------------------------------------------------------------------------------


def wins(verdicts: Verdicts) -> Finding:
    """The first learns more, and the second does not learn; in part, if the second learns, too."""
    if verdicts[MORE] == "falls":
        return "opposite"
    if verdicts[FIRST] == "rises" and verdicts[MORE] == "rises":
        return "in part" if verdicts[SECOND] == "rises" else "holds"
    return "not shown"


def beats(verdicts: Verdicts) -> Finding:
    """The first learns, and more than the second."""
    if verdicts[MORE] == "falls":
        return "opposite"
    return "holds" if verdicts[FIRST] == "rises" and verdicts[MORE] == "rises" else "not shown"


def always(wanted: Verdict) -> Callable[[Verdicts], Finding]:
    other = {"rises": "falls", "falls": "rises"}[wanted]

    def rule(verdicts: Verdicts) -> Finding:
        found = set(verdicts.values())
        return "holds" if found == {wanted} else "opposite" if found == {other} else "not shown"

    return rule


def semi_does_not_hack(verdicts: Verdicts) -> Finding:
    """On-policy raises the caption reward and loses some of the rest; semi-on-policy loses none, and demonstrably less of some of it.

    In part, if on-policy alone loses some of the rest, and the caption reward or the difference is not shown.
    """
    lost_on, lost_semi = falling(verdicts, "on-policy: "), falling(verdicts, "semi: ")
    if lost_semi and not lost_on:
        return "opposite"
    if not lost_on or lost_semi:
        return "not shown"
    kept = any(verdicts[f"semi minus on-policy: {name}"] == "rises" for name in lost_on)
    return "holds" if kept and verdicts["on-policy: caption"] == "rises" else "in part"


def off_policy_collapses(verdicts: Verdicts) -> Finding:
    """Off-policy loses the caption reward, more than semi-on-policy does, and at least half of the rest; in part, if one of the two."""
    if verdicts["off-policy minus semi: caption"] == "rises":
        return "opposite"
    measured = sum(name.startswith("off-policy: ") for name in verdicts) - 1
    caption = verdicts["off-policy: caption"] == verdicts["off-policy minus semi: caption"] == "falls"
    others = 2 * len(falling(verdicts, "off-policy: ")) >= measured
    return "holds" if caption and others else "in part" if caption or others else "not shown"


def scale_trades(verdicts: Verdicts) -> Finding:
    """With the scale the gain rises and some metric falls; in part, if none falls."""
    inside = verdicts["in-domain: gain"]
    if inside != "rises":
        return "opposite" if inside == "falls" else "not shown"
    return "holds" if falling(verdicts, "out-of-domain: ") else "in part"


def falling(verdicts: Verdicts, prefix: str) -> list[str]:
    """Return what falls among the tests of a prefix, the caption reward aside."""
    names = [name.removeprefix(prefix) for name, verdict in verdicts.items() if name.startswith(prefix) and verdict == "falls"]
    return [name for name in names if name != "caption"]


# Claims ----------------------------------------------------------------------------------------------------------------------------

COPO, SHARED, FRESH = (("methods", name) for name in ("ar_copo", "sde_shared", "sde_fresh"))
NEIGHBOR, COPO_UNSCALED, SDE_UNSCALED = (("controls", name) for name in ("neighbor", "ar_copo_unscaled", "sde_unscaled"))
PUBLISHED = ("published", "sde_published")


def _contest(title: str, source: str, first: Where, second: Where, rule: Callable[[Verdicts], Finding]) -> Claim:
    return Claim(title, source, (first, second), contest(first, second), rule)


def _under(kind: str, level: float) -> Claim:
    first, second = (("judges", judged_by(base, kind, level)) for base in JUDGED)
    title = {"White": "without a slope", "Smooth": "that has a slope", "Rounded": "from rounding"}[kind]
    source = "Our expectation: AR-CoPO's members differ more, so an error as large as a video's spread drowns SDE-GRPO first."
    return _contest(f"AR-CoPO's lead withstands a judge with an error {title}", source, first, second, beats)


_FIGURES = "AR-CoPO, Figures 2 and 7"
_DECIDES = "The initial noise's change of the frames over the largest re-noise's."
_MERGES = tuple(("caption", f"merge_{scale:g}") for scale in PARTS["caption"].scales[:1] + PARTS["caption"].scales[-1:])
CLAIMS = (
    _contest("AR-CoPO learns where SDE-GRPO with frozen initial noise does not", f"{_FIGURES}; both fork.", COPO, SHARED, wins),
    _contest("AR-CoPO learns where SDE-GRPO as published does not", f"{_FIGURES}.", COPO, PUBLISHED, wins),
    _contest("SDE-GRPO learns once each member starts from noise of its own", "CM-GRPO of RAVEN.", FRESH, SHARED, beats),
    _contest("AR-CoPO learns more than Neighbor GRPO", "AR-CoPO: a whole video is too long for one chunk.", COPO, NEIGHBOR, beats),
    _contest("Where the re-noise decides, SDE-GRPO learns more than AR-CoPO", "The control.", SDE_UNSCALED, COPO_UNSCALED, beats),
    Claim(
        "A chunk's initial noise decides what it shows",
        f"AR-CoPO, Figure 6. {_DECIDES}",
        (("entropy", "ar_copo"),),
        by_pivot("ar_copo"),
        always("rises"),
        ratio=True,
    ),
    Claim(
        "On the unscaled step list the re-noise decides",
        f"By the signal that a step leaves in so small a video. {_DECIDES}",
        (("entropy", "ar_copo_unscaled"),),
        by_pivot("ar_copo_unscaled"),
        always("falls"),
        ratio=True,
    ),
    *(_under(kind, PARTS["judges"].levels[-1]) for kind in KINDS),
    Claim(
        "On the caption reward alone, on-policy training hacks and semi-on-policy training does not",
        "AR-CoPO, Table 2.",
        (ON, SEMI),
        hacking,
        semi_does_not_hack,
    ),
    Claim("Without the clip, training on stored rollouts collapses", "AR-CoPO, Table 2.", (OFF, SEMI), collapse, off_policy_collapses),
    Claim(
        "The scale of a merge trades in-domain against out-of-domain scores",
        "AR-CoPO, Table 3; slopes over the on-policy adapter's scale. The semi-on-policy adapter was trained on the caption reward alone.",
        _MERGES,
        merge,
        scale_trades,
    ),
)
