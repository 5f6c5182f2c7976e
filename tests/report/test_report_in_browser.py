"""The report in headless Chromium: no script error, no page overflow on a phone, light and dark both readable."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium on the PATH")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
COUNT_ERRORS = "<script>window.errors=[];addEventListener('error',function(e){errors.push(e.message)},true)</script>"
MEASURE = """<script>
var shown = [];
function visible(id) {
  return Array.from(document.querySelectorAll("#" + id + " [data-block]")).filter(function (block) {
    return block.checkVisibility();
  }).map(function (block) { return block.dataset.block; }).join("+");
}
[["metric", "loss"], ["method", "ditto"], ["method", "all"]].forEach(function (pair) {
  var choice = document.getElementById(pair[0] + "-choice");
  if (!choice) return;
  shown.push(visible(pair[0] + "s"));
  choice.value = pair[1]; choice.dispatchEvent(new Event("change"));
  shown.push(visible(pair[0] + "s"));
});
document.querySelectorAll("details").forEach(function (d) { d.open = true; });
var root = document.documentElement, style = getComputedStyle(document.body);
parent.postMessage([innerWidth, root.scrollWidth, errors.length, performance.getEntriesByType("resource").length,
  document.querySelectorAll("figure svg").length, shown.join("/"), style.color, style.backgroundColor].join(";"), "*");
</script>"""


FRAME = """<title></title><script>addEventListener("message", function (e) { document.title = e.data; })</script>
<iframe src="instrumented.html" width="WIDTH" height="900" style="border:0"></iframe>"""


def measure(text: str, folder: Path, width: int, dark: bool) -> list[str]:
    """Open an instrumented copy in a frame (a window cannot be as narrow as a phone) and read what its script says."""
    copy = folder / "instrumented.html"
    copy.write_text(text.replace("<head>", "<head>" + COUNT_ERRORS, 1).replace("</body>", MEASURE + "</body>"))
    outer = folder / "frame.html"
    outer.write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        str(CHROMIUM),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000",
        "--window-size=1400,1000",
        "--dump-dom",
        outer.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert found, done.stderr[-500:]
    return found[1].split(";")


def brightness(color: str) -> float:
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / 3


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
@pytest.mark.parametrize(
    "kind", ["multi-class", "multi-label", "segmentation", "exchange", "comparison", "compared segmentation"]
)
def test_report_opens_without_error_or_overflow(
    pages: dict[str, str], tmp_path: Path, kind: str, width: int, dark: bool
) -> None:
    inner, scroll, errors, fetched, plots, shown, ink, paper = measure(pages[kind], tmp_path, width, dark)
    assert int(inner) == width
    assert int(scroll) <= width
    assert (errors, fetched) == ("0", "0")
    assert int(plots) >= 6
    assert (brightness(ink) > brightness(paper)) == dark
    assert abs(brightness(ink) - brightness(paper)) > 150
    first = "fedavg/ditto/ditto/"
    expected = {
        "comparison": f"auroc/loss/{first}fedavg+local+fedprox+ditto+fedavg-ft+pooled",
        "compared segmentation": f"dice//{first}fedavg+ditto",
    }
    assert shown == expected.get(kind, "")
