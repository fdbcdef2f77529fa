"""The page in a real browser, where one is installed: its script runs, and its controls do what they say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from example_run import write_run

from trl_apex.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """
<script>{
const found = { errors: window.failed };
const range = document.querySelector(".stack input");
range.value = 20; range.dispatchEvent(new Event("input"));
found.one = range.parentElement.style.getPropertyValue("--at");
document.querySelector("[data-to='0']").click();
found.all = [...document.querySelectorAll(".gallery input")].map((r) => r.parentElement.style.getPropertyValue("--at"));
found.pairs = [...document.querySelectorAll("#pairs > figure")].filter((f) => !f.hidden).length;
const pick = document.getElementById("pair"); pick.value = "all"; pick.dispatchEvent(new Event("change"));
found.allPairs = [...document.querySelectorAll("#pairs > figure")].filter((f) => !f.hidden).length;
const chart = document.querySelector("[data-chart]");
chart.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
found.tip = chart.querySelector(".tip").innerText;
const cards = [...document.querySelectorAll(".pair")];
const order = document.querySelector(".order"); order.value = "-1"; order.dispatchEvent(new Event("change"));
const gains = [...document.querySelectorAll(".pair")].map((c) => Number(c.dataset.gain));
found.sorted = gains.every((g, i) => i === 0 || gains[i - 1] >= g) && gains.length === cards.length;
const visible = () => [...document.querySelectorAll(".pair")].filter((c) => c.offsetParent).length;
found.short = visible(); document.querySelector(".more button").click(); found.full = visible();
found.wide = document.documentElement.scrollWidth - window.innerWidth;
found.cut = [...document.querySelectorAll(".pair td, .pair th, .results th, .legend li, figcaption strong")]
  .filter((cell) => cell.scrollWidth > cell.clientWidth + 1 && cell.clientWidth).map((cell) => cell.textContent);
found.overlaps = [...document.querySelectorAll("svg")].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll("text")].map((t) => [t.textContent, t.getBoundingClientRect()]).filter((b) => b[1].width);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
    Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 5)
    .map(([b]) => svg.getAttribute("aria-label").slice(0, 30) + ": " + a + " / " + b));
});
document.body.innerHTML = "<pre id=found></pre>";
document.getElementById("found").textContent = JSON.stringify(found);
}</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")
@pytest.mark.parametrize("width", [500, 1280])
def test_controls_work_and_labels_do_not_overlap(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("jpeg_compressibility", "negative_brightness_of_background", "vlm_judge_composition", "hps")
    monkeypatch.setattr("example_run.LEVELS", dict.fromkeys(names, (-12.5, 1.2, 2.0)))
    run = write_run(tmp_path / "run", samples=12)
    source = write_report([run], tmp_path / "plain.html").read_text()
    watch = "<script>window.failed = []; window.onerror = (m) => { window.failed.push(String(m)); };</script>"
    page = tmp_path / "probed.html"
    page.write_text(source.replace("<body>", "<body>" + watch, 1).replace("</body>", PROBE + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", f"file://{page}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="found">(.*?)</pre>', shown, re.S)
    assert match, shown[-2000:]
    found = json.loads(match[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert found["errors"] == []
    assert found["one"] == "20%" and set(found["all"]) == {"0%"}
    assert found["pairs"] == 1 and found["allPairs"] == 6
    assert found["tip"].startswith("step 2")
    assert found["sorted"] and (found["short"], found["full"]) == (6 if width < 560 else 8, 12)
    assert found["wide"] <= 0 and found["cut"] == []
    assert found["overlaps"] == []
