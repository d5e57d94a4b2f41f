// SPDX-License-Identifier: Apache-2.0
// Shows an answer of the server. All that comes from files or the index is put in as text, never as HTML.
"use strict";

let about = null;
const byId = (id) => document.getElementById(id);

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

const percent = (value) => `${Math.round(100 * value)} %`;

function showResult(analysis) {
  byId("result-name").textContent = analysis.name;
  byId("result-kind").textContent = analysis.kind;
  byId("result-time").textContent = `analysed in ${analysis.seconds.toFixed(1)} s`;
  const warnings = byId("warnings");
  warnings.replaceChildren(...analysis.warnings.map((text) => element("li", "", text)));
  warnings.hidden = !analysis.warnings.length;
  byId("pictures").replaceChildren(...analysis.pictures.map(picture));
  showSlabs(analysis.slabs);
  showFindings(analysis);
  byId("seen").replaceChildren(
    ...Object.entries(analysis.seen).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]),
  );
  showNeighbours(byId("neighbours"), analysis.neighbours, analysis.dim);
  byId("result").hidden = false;
}

function picture(shown) {
  const figure = element("figure");
  const stack = element("div", "stack");
  const image = element("img");
  image.src = shown.image;
  image.alt = shown.text;
  const overlay = element("img", "overlay");
  overlay.src = shown.overlay;
  overlay.alt = "";
  stack.append(image, overlay);
  figure.append(stack);
  if (shown.slice !== null) {
    const place = `Slice ${shown.slice} of the input, about ${shown.file_slice} in the file, from the feet`;
    figure.append(element("figcaption", "", `${place}; slab score ${shown.score.toFixed(2)} × mean`));
  } else {
    figure.append(element("figcaption", "", "The field of view of the network, shown in more pixels than it gets"));
  }
  return figure;
}

function showSlabs(slabs) {
  const figure = byId("slabs");
  figure.hidden = !slabs.length;
  if (!slabs.length) return figure.replaceChildren();
  const [width, height, left, bottom] = [420, 130, 44, 24];
  const top = Math.max(...slabs.map((slab) => slab.score), 1) * 1.1;
  const y = (value) => (height - bottom) * (1 - value / top);
  const step = (width - left) / slabs.length;
  const drawing = vector("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const words = slabs.map((slab, i) => `slab ${i}: ${slab.score.toFixed(2)}${slab.selected ? ", selected" : ""}`);
  drawing.setAttribute("aria-label", `Slab scores over their mean, from feet to head. ${words.join("; ")}.`);
  slabs.forEach((slab, i) => {
    const bar = { x: left + i * step + step * 0.06, y: y(slab.score), width: step * 0.88 };
    const made = vector("rect", { ...bar, height: height - bottom - y(slab.score), rx: 2 });
    if (slab.selected) made.setAttribute("class", "selected");
    const title = vector("title", {});
    title.textContent = words[i];
    made.append(title);
    drawing.append(made);
  });
  drawing.append(vector("line", { x1: left, x2: width, y1: y(1), y2: y(1) }));
  for (const [x, at, anchor, text] of [
    [left - 5, y(1) + 4, "end", "mean"],
    [left, height - 6, "start", "feet"],
    [width, height - 6, "end", "head"],
  ]) {
    const made = vector("text", { x, y: at, "text-anchor": anchor });
    made.textContent = text;
    drawing.append(made);
  }
  const caption = "Attention per slab over the mean. A slice is taken from each of the blue slabs.";
  return figure.replaceChildren(drawing, element("figcaption", "", caption));
}

function vector(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function showFindings(analysis) {
  const sorted = [...analysis.findings].sort((a, b) => b.probability - a.probability);
  byId("findings").replaceChildren(
    ...sorted.map((finding) => {
      const item = element("li");
      const track = element("span", "track");
      const fill = element("span");
      fill.style.width = `${100 * finding.probability}%`;
      track.setAttribute("aria-hidden", "true");
      track.append(fill);
      item.append(element("span", "name", finding.name), track, element("span", "value", percent(finding.probability)));
      return item;
    }),
  );
  const phantoms = about && about.phantoms ? " This checkpoint learned from synthetic phantoms alone." : "";
  byId("findings-note").textContent = sorted.length
    ? `Nearer to sentences that affirm a finding (right) or deny it (left)? Prompts: ${analysis.prompts}; not calibrated.${phantoms}`
    : `No prompt set is loaded for ${analysis.kind === "CT" ? "CT volumes" : "X-rays"}.`;
}

// Those of the study's own dimension come first.
function showNeighbours(place, neighbours, own = 2) {
  place.replaceChildren();
  if (!neighbours) return;
  const groups = [
    ["Nearest X-ray reports", neighbours.reports, 2],
    ["Nearest CT reports", neighbours.reports, 3],
    ["Nearest X-rays", neighbours.studies, 2],
    ["Nearest CTs", neighbours.studies, 3],
  ];
  for (const [title, all, dim] of own === 2 ? groups : [groups[1], groups[0], groups[3], groups[2]]) {
    const list = all.filter((hit) => hit.dim === dim);
    if (!list.length) continue;
    const card = element("section", place.id === "neighbours" ? "card" : "");
    const items = element("ol");
    items.append(...list.map(neighbour));
    card.append(element("h3", "", title), items);
    place.append(card);
  }
}

function neighbour(hit) {
  const item = element("li");
  if (hit.thumbnail) {
    const image = element("img");
    image.loading = "lazy";
    image.alt = `${hit.dim === 2 ? "X-ray" : "Middle slice of CT"} ${hit.id}`;
    image.addEventListener("error", () => image.remove());
    image.src = hit.thumbnail;
    item.append(image);
  }
  const head = element("div", "head");
  const chip = element("span", "chip", hit.dim === 2 ? "X-ray" : "CT");
  head.append(element("b", "", hit.id), chip, element("span", "muted", `similarity ${hit.similarity.toFixed(3)}`));
  item.append(head, reportText(hit.text));
  return item;
}

function reportText(text) {
  if (!text) return element("div", "text muted", "no report in the index");
  if (text.length <= 240) return element("div", "text", text);
  const details = element("details", "text");
  const cut = text.slice(0, 200).replace(/\s+\S*$/, "");
  details.append(element("summary", "", `${cut} …`), element("p", "", text.slice(cut.length)));
  return details;
}
