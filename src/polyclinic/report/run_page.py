"""What the page of one run shows."""

from __future__ import annotations

from typing import Any

from polyclinic.evaluation.names import HEADLINE
from polyclinic.report.chapters import chapters
from polyclinic.report.curves import site_effort, traffic_panels, traffic_table
from polyclinic.report.figures import Key
from polyclinic.report.folder import Json, Run
from polyclinic.report.gallery import example_id
from polyclinic.report.pictures import example_cards
from polyclinic.report.synthesis_chapter import synthesis_chapter
from polyclinic.report.transfer_chapter import transfer_chapter


def run_context(run: Run) -> dict[str, Any]:
    """Everything ``run.html`` needs."""
    metrics = run.metrics
    kind, classes = metrics["task"], metrics["classes"]
    examples = {site: _cards(run, site) for site, arrays in run.examples.items() if len(arrays["images"])}
    method = ", ".join([metrics["method"], method_settings(run.study["method"])]).removesuffix(", ")
    return {
        "title": f"{metrics['study']}: {metrics['method']}",
        "study": run.study,
        "metrics": metrics,
        "environment": run.environment,
        "privacy": run.privacy,
        "facts": {"Method": method} | facts(run.study) | public_images(metrics) | {"Seed": str(metrics["seed"])},
        "central": central_rows(metrics),
        "headline": HEADLINE[kind],
        "rows": headline_rows(metrics, classes),
        "label_rows": label_rows(metrics),
        "chapters": chapters(run),
        "op_keys": Key.of([row["op"] for row in traffic_table(run) if row["rounds"]]),
        "examples": examples,
        "synthesis": synthesis_chapter(run, examples),
        "transfer": transfer_chapter(run),
        "traffic": traffic_panels(run),
        "traffic_rows": traffic_table(run),
        "effort_rows": site_effort(run),
        "notes": notes(run),
        "confidence": run.study["evaluation"]["confidence"],
        "bootstrap": run.study["evaluation"]["bootstrap"],
    }


def _cards(run: Run, site: str) -> list[Json]:
    """Cards of a site's examples; those that the gallery of samples shows again have an id."""
    cards = example_cards(run.examples[site], run.metrics["classes"], run.metrics["task"], site)
    return [{**card, "id": example_id(site, n) if run.samples else ""} for n, card in enumerate(cards, start=1)]


def facts(study: Json) -> dict[str, str]:
    """The study in a few lines: task, data, network, training."""
    task, data, model, training = study["task"], study["data"], study["model"], study["training"]
    source = "real images, " + ", ".join(table["path"] for table in data["tables"]) if data["tables"] else ""
    if data.get("phantom"):
        source = f"made-up images (phantom {data['phantom']['kind']}, seed {data['phantom']['seed']})"
    length = (
        f"{training['steps']} steps"
        if training.get("steps")
        else f"{training['epochs']} epoch{'s' * (training['epochs'] > 1)}"
    )
    return {
        "Task": _task(task),
        "Images": f"{source}; {' × '.join(map(str, data['image']['size']))} pixels",
        "Network": _networks(model, study.get("models") or {}),
        "Local training": f"{training['optimizer']}, learning rate {training['lr']:g}, batches of "
        f"{training['batch_size']}, {length} per round",
    }


def _networks(model: Json, models: Json) -> str:
    """The study's network; with networks of their own at some sites these first, by site."""
    usual = f"{model['name']}, {model['norm']} normalisation"
    own = [f"{site}: {one['name']}, {one['norm']} normalisation" for site, one in models.items() if one != model]
    return "; ".join([*own, f"otherwise {usual}"]) if own else usual


def public_images(metrics: Json) -> dict[str, str]:
    """The public images that sites and server shared, in a line; empty where there were none."""
    found = metrics.get("proxies")
    if not found:
        return {}
    passes = f"; {found['pretrain']} passes over them before round 1" if found["pretrain"] else ""
    text = f"{found['name']}, {found['images']} of {len(found['classes'])} classes, SHA-256 {found['sha256'][:12]}…"
    return {"Public images": f"{text}{passes}"}


def central_rows(metrics: Json) -> list[Json]:
    """One row per metric of the server's own model: cells of the mean and each site; none where there is no such
    model."""
    central = metrics.get("central") or {}
    return [
        {"metric": name, "mean": cell, "sites": [entry[name] for entry in central.values()]}
        for name, cell in (metrics.get("central_mean") or {}).items()
    ]


def _task(task: Json) -> str:
    text = f"{task['kind']}: {', '.join(task['classes'])}"
    if task["kind"] != "segmentation" or len(task["classes"]) > 2:
        return text
    chosen = task.get("threshold", 0.5)
    return f"{text}; threshold {'chosen by each site on its validation images' if chosen == 'validation' else chosen}"


def method_settings(method: Json) -> str:
    """Settings of a method in one line, without its name, its label and its synthesis, which has a chapter."""
    hidden = ("name", "label", "synthesis")
    return ", ".join(f"{name} {value}" for name, value in method.items() if name not in hidden)


def headline_rows(metrics: Json, classes: list[str]) -> list[Json]:
    """One row per metric: cells of the mean, the worst site and each site."""
    alone = len(classes) == 2 and metrics["task"] == "segmentation"
    names = [name for name in metrics["mean"] if not (alone and name.endswith(f"_{classes[1]}"))]
    return [
        {
            "metric": name,
            "mean": metrics["mean"][name],
            "worst": metrics["worst"][name],
            "sites": [entry["test"][name] for entry in metrics["sites"].values()],
        }
        for name in names
    ]


def label_rows(metrics: Json) -> list[Json]:
    """Images of each class, by site and split; none for segmentation or where the run did not count them."""
    rows = []
    for site, entry in metrics["sites"].items():
        counts = entry.get("labels") or {}
        for name in metrics["classes"]:
            row = [counts.get(split, {}).get(name, 0) for split in ("train", "val", "test")]
            rows.append({"site": site, "name": name, "counts": row})
    return rows if any(any(row["counts"]) for row in rows) else []


def notes(run: Run) -> list[tuple[str, str]]:
    """Where and what: notes of the run, of each site, and absences by round."""
    found = [("", str(note)) for note in run.metrics.get("notes", [])]
    found += [(site, str(note)) for site, entry in run.metrics["sites"].items() for note in entry.get("notes", [])]
    for record in run.rounds:
        found += [(site, f"absent in round {record['round']}: {why}") for site, why in record.get("absent", {}).items()]
    return found
