"""What stands at the head of a report: figures, verdicts, the state of the data sets, and how it was measured."""

from eval.report_data import MEASURED, SEVEN, TITLES, Results, speed_of, title_of
from eval.report_lines import best_of_ours, best_rival, between, lines_of, verdict
from eval.report_rows import Difference
from eval.report_tables import minus, percent, rate
from eval.rivals import OURS

_SET = ("title", "state", "text")
CARDS_NOTE = (
    "In brackets: 95 % paired bootstrap interval of the difference on the same images, drawn within each data set. An "
    "interval that holds zero is called a tie. The best rival is picked after the fact, which favours the rival; "
    "oracles and rows that miss the budget by more than 1 % are left out."
)


def facts_of(results: Results) -> list[tuple[str, str]]:
    """Large figures of the head of the page."""
    images = sum(panel.num_images for panel in results.panels)
    speed = speed_of(results)
    facts = [(f"{results.dense_macs / 1e9:.2f} GMAC", "image tower, unpruned, per image")]
    facts += [(f"{len(results.methods)}", "methods"), (f"{images:,}", "images judged by each")]
    if speed:
        facts.append(
            (
                f"{rate(speed['dense_images_per_s'])} images/s",
                f"unpruned, {speed['runtime']}, {speed['device']}, "
                f"{speed['threads']} thread{'s' * (speed['threads'] > 1)}",
            )
        )
    return facts


def summary_of(results: Results) -> str:
    """What the cards say, in one sentence."""
    words = {"beats": 0, "ties with": 0, "loses to": 0}
    for macs in results.budgets:
        best = best_rival(lines_of(results, macs))
        if best is not None and best.mean.hit_against is not None:
            words[verdict(best.mean.hit_against)] += 1
    total = sum(words.values())
    if not total:
        return "Only our own method has been measured so far."
    said = ", ".join(f"{word} it at {count}" for word, count in words.items() if count)
    return (
        f"Held against the best rival of each budget in top-1 accuracy, our method {said} of {total} budgets. "
        "Below: by how much, at which speed, and what is lost."
    )


def card_of(results: Results, macs: float) -> dict | None:
    """Ours against the best rival of a budget; None without a rival."""
    lines = lines_of(results, macs)
    ours = next((line for line in lines if line.method == OURS and line.mean), None)
    best, close = best_rival(lines), best_rival(lines, "cosine")
    if ours is None or best is None or best.mean.hit_against is None:
        return None
    word = verdict(best.mean.hit_against)
    lost = 100 * (ours.mean.dense_acc1 - ours.mean.acc1)
    speed = f", ×{ours.speedup:.2f} images/s" if ours.speedup else ""
    nearest = close and close.mean.cosine_against
    cosine = ""
    if nearest:
        cosine = f" In cosine ours {verdict(nearest)} {close.method}: {_range(nearest, -1, 4)}."
    top = best_of_ours(lines)
    more = ""
    if top is not None and top.method != OURS:
        gain = between(results, macs, top.method, best.method)
        more = f"{top.method}: {100 * top.mean.acc1:.1f} %, {_range(gain, 100, 1)} points to {best.method}"
    return {
        "more": more,
        "tone": word.split()[0],
        "where": f"{100 * macs:g} % of the MACs{speed}",
        "value": f"{100 * ours.mean.acc1:.1f} %",
        "loss": f"{minus(f'{-lost:+.1f}')} points to the unpruned tower",
        "verdict": word,
        "rival": best.method,
        "detail": f"Difference to it: {_range(best.mean.hit_against, -100, 1)} points of top-1.{cosine}",
    }


def _range(against: Difference, scale: float, digits: int) -> str:
    low, high = sorted((scale * against.low, scale * against.high))
    return minus(f"{scale * against.mean + 0.0:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


def sets_of(results: Results) -> list[dict]:
    """State of every data set, with the unpruned accuracy where it was measured."""
    accuracy = {panel.dataset: percent(panel.dense.record.metrics["acc1"]) for panel in results.panels}
    num = {panel.dataset: panel.num_images for panel in results.panels}
    known = {one["name"]: one for one in results.suite.get("sets", [])}
    found = []
    for name in [*num, *known, *SEVEN]:
        one = known.get(name, {"title": title_of(name), "state": "not measured", "text": "no suite has looked for it"})
        if name in num and one["state"] != MEASURED:
            one = {"title": title_of(name), "state": MEASURED, "text": f"{num[name]:,} test images"}
        found.append({"name": name, "accuracy": accuracy.get(name)} | {key: one[key] for key in _SET})
    unique = {one["name"]: one for one in found}
    order = list(TITLES)
    return sorted(
        unique.values(),
        key=lambda one: (one["name"] in SEVEN, order.index(one["name"]) if one["name"] in order else -1),
    )


def absences_of(results: Results) -> list[str]:
    """Methods that were skipped, and rows that a budget or a tower rules out; one entry per reason."""
    there, reasons = set(results.methods), {}
    for one in results.suite.get("methods", []):
        if one["state"] != "measured" and one["name"] not in there:
            reasons.setdefault(one["reason"], []).append(one["name"])
    for one in results.suite.get("unreached", []):
        if one["method"] in there:
            reasons.setdefault(one["reason"], []).append(f"{one['method']} at {100 * one['macs']:g} %")
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _changed(results: Results) -> str:
    """Which rows change weights of the tower."""
    calibrated = [method for method in results.methods if "calibrated" in method]
    rest = "no other row changes a weight of the tower" if calibrated else "No row changes a weight of the tower"
    return (f"{', '.join(calibrated)}: LayerNorm affines re-fitted; " if calibrated else "") + f"{rest}."


def method_of(results: Results) -> list[str]:
    """Sentences on the machine, the weights and the commands."""
    record, speed = results.panels[0].dense.record, speed_of(results)
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    found = [
        f"Weights: {results.model} {record.pretrained}, hash {results.weights_hash[:16]}. {_changed(results)}",
        "A MAC is one multiply-add, 1 MAC = 2 FLOP; the image tower alone is counted.",
        f"Machine: {record.host.get('processor', 'unknown')}, {record.host.get('device', 'cpu')}; {versions}.",
    ]
    notes = {panel.dense.record.note for panel in results.panels if panel.dense.record.note}
    found += [f"Probe on dense features, applied unchanged to pruned ones: {note}." for note in sorted(notes)]
    if speed:
        found.append(
            f"Speed: every call stands right behind one of the unpruned tower; images/s = median of the unpruned "
            f"({speed['dense_images_per_s']:.1f}) × median ratio of {speed['rounds']} pairs, batch {speed['batch']}, "
            f"{speed['threads']} thread(s), {speed['precision']}, {speed['device']}."
        )
    commands = dict.fromkeys([record.command, results.suite.get("command"), *(one["command"] for one in results.speed)])
    return found + [f"Command: {one}" for one in commands if one]
