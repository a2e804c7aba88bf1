// What pages of a server do: they ask for charts, stay at the end of a log, and tell htmx about answers.
"use strict";

// A part that is what the browser has is not sent again.
document.addEventListener("htmx:configRequest", (event) => {
  const element = event.detail.elt;
  if (element.dataset.seen && element === event.detail.target) event.detail.headers["X-Seen"] = element.dataset.seen;
});
document.addEventListener("htmx:sendError", () => { document.getElementById("offline").hidden = false; });
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.xhr.status) document.getElementById("offline").hidden = true; // 0: aborted, or not sent
});
document.addEventListener("htmx:afterSwap", (event) => {
  const seen = event.detail.xhr.getResponseHeader("X-Seen");
  const part = document.getElementById(event.detail.target.id);
  if (seen && part) part.dataset.seen = seen;
});
document.addEventListener("htmx:responseError", (event) => {
  if (event.detail.requestConfig.verb !== "post") return;
  const said = document.createElement("p");
  said.className = "problem";
  said.textContent = event.detail.xhr.responseText;
  document.getElementById("said").replaceChildren(said);
});

// The log: stay at its end, and keep so much of it that the page stays quick.
const MAX_PARTS = 40;
const log = document.getElementById("log");
if (log) {
  const follow = document.getElementById("follow");
  const toEnd = () => { if (follow && follow.checked) log.scrollTop = log.scrollHeight; };
  toEnd();
  if (follow) follow.addEventListener("change", toEnd);
  new MutationObserver(() => {
    const parts = log.querySelectorAll("pre > span");
    for (let i = 0; i < parts.length - MAX_PARTS; i++) parts[i].remove();
    toEnd();
  }).observe(log, { childList: true, subtree: true });
}

// Charts
const REST = 2; // times as long as asking and drawing took, before the next time
for (const area of document.querySelectorAll("[data-charts]")) {
  const section = area.closest("section");
  const value = section.querySelector("select");
  const chosen = () => (value ? value.value : "");
  const show = chartsIn(area);
  let shown = null;
  let seen = "";
  const load = async () => {
    const asked = chosen();
    const headers = { "HX-Request": "true", ...(seen && shown === asked ? { "X-Seen": seen } : {}) };
    const answer = await fetch(`${area.dataset.charts}?value=${encodeURIComponent(asked)}`, { headers }).catch(() => null);
    if (!answer || answer.status === 204) return;
    if (answer.status !== 200) {
      section.hidden = false;
      if (shown === null) area.textContent = await answer.text();
      return;
    }
    const charts = await answer.json();
    if (asked !== chosen()) return; // another one has been chosen
    section.hidden = charts.length === 0; // before it is drawn, because that takes the size of what is shown
    show(charts, shown !== asked);
    shown = asked;
    seen = answer.headers.get("X-Seen");
  };
  const repeat = async () => {
    const began = performance.now();
    try {
      if (!document.hidden) await load();
    } finally {
      setTimeout(repeat, Math.max(area.dataset.seconds * 1000, REST * (performance.now() - began)));
    }
  };
  if (value) value.addEventListener("change", load);
  repeat();
}
