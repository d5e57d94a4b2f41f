// SPDX-License-Identifier: Apache-2.0
// Takes files and sentences to the server, and says how that goes.
"use strict";

let running = null;
// where dropped files lie
const places = new WeakMap();

const megabytes = (bytes) => (bytes < 2 ** 20 ? `${Math.ceil(bytes / 1024)} kB` : `${(bytes / 2 ** 20).toFixed(1)} MB`);

function showError(id, message) {
  byId(id).textContent = message;
  byId(id).hidden = !message;
}

async function start() {
  try {
    about = await (await fetch("/api/about")).json();
  } catch {
    return showError("error", "The server does not answer. Start it again, then reload this page.");
  }
  byId("limit").textContent = `At most ${Math.round(about.max_upload_bytes / 2 ** 20)} MB.`;
  const searchable = Object.keys(about.index).length > 0;
  byId("query").hidden = !searchable;
  byId("no-index").hidden = searchable;
  const counts = [["report", "reports"], ["xray", "X-rays"], ["volume", "CTs"]]
    .filter(([name]) => about.index[name])
    .map(([name, words]) => `${about.index[name]} ${words}`);
  byId("about").textContent = [
    `Checkpoint ${about.checkpoint}, ${about.model.slice(0, 12)}, on ${about.device}.`,
    about.phantoms ? "It learned from synthetic phantoms: results on real images only show how it works." : "",
    searchable ? `Index: ${counts.join(", ")}.` : "",
  ].join(" ");
}

function analyse(files) {
  if (!files.length) return showError("error", "There is no file in what was dropped.");
  showError("error", "");
  const total = files.reduce((sum, file) => sum + file.size, 0);
  if (about && total > about.max_upload_bytes) {
    const most = megabytes(about.max_upload_bytes);
    return showError("error", `${files[0].name}: ${megabytes(total)} is larger than ${most}. Drop a smaller file, or start the server with a larger --max_upload_mb.`);
  }
  if (about && files.length > about.max_files) {
    return showError("error", `${files.length} files at once, more than ${about.max_files}. Drop one series.`);
  }
  if (running) running.abort();
  const form = new FormData();
  // with its folders, which tell series apart
  for (const file of files) form.append("files", file, places.get(file) || file.webkitRelativePath || file.name);
  const request = new XMLHttpRequest();
  running = request;
  const label = files.length === 1 ? files[0].name : `${files.length} files`;
  byId("result").hidden = true;
  showProgress(0, `Uploading ${label}`);
  request.upload.addEventListener("progress", (event) => {
    if (event.lengthComputable) showProgress(event.loaded / event.total, `Uploading ${label}`);
  });
  request.upload.addEventListener("load", () => showProgress(null, `Analysing ${label}`));
  request.addEventListener("loadend", () => {
    if (running !== request) return;
    running = null;
    byId("progress").hidden = true;
    finish(request);
  });
  request.open("POST", "/api/analyse");
  request.responseType = "json";
  request.send(form);
}

function finish(request) {
  const answer = request.response;
  if (request.status === 200 && answer) {
    showResult(answer);
    byId("status").textContent = `${answer.name} was analysed.`;
    byId("result-name").focus();
    byId("result").scrollIntoView({ block: "start" });
  } else if (request.status) {
    byId("status").textContent = "";
    showError("error", answer && answer.error ? answer.error : `The server answered with ${request.status}.`);
  } else if (!request.aborted) {
    byId("status").textContent = "";
    showError("error", "The connection broke off: the server was stopped, or a file changed while it was read. Try again.");
  }
}

function showProgress(share, text) {
  const bar = byId("progress-bar");
  if (share === null) bar.removeAttribute("value");
  else bar.value = share;
  byId("progress-text").textContent = text;
  // said once per stage, not with each step of the bar
  if (byId("status").textContent !== text) byId("status").textContent = text;
  byId("progress").hidden = false;
}

// A dropped folder is walked through; readEntries gives at most 100 entries at a time.
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail));
    places.set(file, entry.fullPath.slice(1));
    return [file];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const part = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!part.length) return found;
    for (const child of part) found.push(...(await filesOf(child)));
  }
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  if (!entries.length) return analyse([...transfer.files]);
  try {
    const files = [];
    for (const entry of entries) files.push(...(await filesOf(entry)));
    return analyse(files);
  } catch {
    return showError("error", "A dropped file could not be read. Check that it is still there, and try again.");
  }
}

async function search(event) {
  event.preventDefault();
  showError("query-error", "");
  byId("hits").replaceChildren();
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ text: byId("sentence").value });
  try {
    const answer = await fetch("/api/search", { method: "POST", headers, body });
    const content = await answer.json();
    if (answer.ok) showNeighbours(byId("hits"), content);
    else showError("query-error", content.error);
  } catch {
    showError("query-error", "The server does not answer. Start it again, then reload this page.");
  }
}

for (const id of ["files", "folder"]) {
  byId(id).addEventListener("change", (event) => {
    const files = [...event.target.files];
    // so that the same file can be chosen again
    event.target.value = "";
    if (files.length) analyse(files);
  });
}
const zone = byId("upload");
// anywhere on the page: a file dropped beside the zone would otherwise replace the page
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  zone.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) zone.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  zone.classList.remove("over");
  dropped(event.dataTransfer);
});
zone.addEventListener("submit", (event) => event.preventDefault());
byId("cancel").addEventListener("click", () => {
  if (!running) return;
  running.aborted = true;
  running.abort();
});
byId("opacity").addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--overlay", event.target.value / 100);
});
byId("query").addEventListener("submit", search);
start();
