"use strict";
// Dividers between base and tuned images.
for (const gallery of document.querySelectorAll(".gallery")) {
  const ranges = [...gallery.querySelectorAll("input[type=range]")];
  const place = (range) => range.parentElement.style.setProperty("--at", range.value + "%");
  for (const range of ranges) range.addEventListener("input", () => place(range));
  const controls = gallery.previousElementSibling;
  const all = controls.querySelector(".all-range");
  const moveAll = (value) => {
    all.value = value;
    for (const range of ranges) { range.value = value; place(range); }
  };
  all.addEventListener("input", () => moveAll(all.value));
  for (const button of controls.querySelectorAll("button")) button.addEventListener("click", () => moveAll(button.dataset.to));
  const drawn = [...gallery.children], order = controls.querySelector(".order");
  order.addEventListener("change", () => {
    const way = Number(order.value);
    gallery.replaceChildren(...(way ? drawn.slice().sort((a, b) => way * (a.dataset.gain - b.dataset.gain)) : drawn));
  });
  const more = gallery.nextElementSibling;
  if (more && more.classList.contains("more")) {
    gallery.classList.add("short");
    more.hidden = false;
    more.firstElementChild.addEventListener("click", () => { gallery.classList.remove("short"); more.hidden = true; });
  }
}

// Values of a chart under the pointer, or by arrow keys.
for (const chart of document.querySelectorAll("[data-chart]")) {
  const data = JSON.parse(chart.dataset.chart);
  const svg = chart.querySelector("svg"), cross = svg.querySelector(".cross"), tip = chart.querySelector(".tip");
  const longest = data.lines.reduce((a, b) => (a.x.length >= b.x.length ? a : b));
  let index = longest.x.length - 1;
  const nearest = (xs, x) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
  const show = () => {
    const x = longest.x[index];
    const share = data.left + (x - data.x[0]) / (data.x[1] - data.x[0]) * (data.right - data.left);
    const at = share * svg.viewBox.baseVal.width;
    cross.setAttribute("x1", at); cross.setAttribute("x2", at); cross.style.visibility = "visible";
    tip.replaceChildren(...["step " + Math.round(x), ...data.lines.map((l) => (l.name + " " + l.y[nearest(l.x, x)]).trim())].map((text) => {
      const row = document.createElement("div"); row.textContent = text; return row;
    }));
    tip.hidden = false;
    const left = svg.getBoundingClientRect().left - chart.getBoundingClientRect().left + share * svg.clientWidth;
    const room = chart.clientWidth - tip.offsetWidth - 4;
    tip.style.left = Math.max(4, Math.min(left + 12 > room ? left - tip.offsetWidth - 12 : left + 12, room)) + "px";
    tip.style.top = svg.getBoundingClientRect().top - chart.getBoundingClientRect().top + 4 + "px";
  };
  const hide = () => { tip.hidden = true; cross.style.visibility = "hidden"; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - data.left) / (data.right - data.left);
    index = nearest(longest.x, data.x[0] + share * (data.x[1] - data.x[0]));
    show();
  });
  svg.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const last = longest.x.length - 1;
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    index = Math.max(0, Math.min(last, tip.hidden && event.key.startsWith("Arrow") ? index : to));
    show();
  });
}

// One pair of objectives at a time.
const pick = document.getElementById("pair");
if (pick) {
  const charts = [...document.querySelectorAll("#pairs > figure")];
  const choose = () => charts.forEach((chart, i) => { chart.hidden = pick.value !== "all" && pick.value !== String(i); });
  pick.addEventListener("change", choose);
  choose();
}
