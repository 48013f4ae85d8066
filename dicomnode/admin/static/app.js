"use strict";
// Retry buttons, and a refresh that keeps the place where somebody reads.
// The header cannot be sent by a page of another origin, see admin/guard.py.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-retry]");
  if (!button) return;
  button.disabled = true;
  const answer = await fetch(button.dataset.retry, { method: "POST", headers: { "X-Dicomnode": "1" } });
  if (answer.ok) {
    await refresh();
    return;
  }
  const body = await answer.json().catch(() => ({}));
  const why = (body.error && `${body.error.cause}. ${body.error.hint}`) || String(answer.status);
  const said = document.createElement("p");
  said.className = "error";
  said.setAttribute("role", "alert");
  said.textContent = why;
  button.replaceWith(said);
});

function busy() {
  return document.hidden || document.querySelector("details[open]") || String(getSelection());
}

async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } }).catch(() => null);
  document.body.classList.toggle("stale", !(answer && answer.ok));
  if (!answer || !answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const focused = document.activeElement && document.activeElement.dataset.retry;
  for (const part of ["header", "main", "footer"]) {
    document.querySelector(part).replaceWith(document.adoptNode(fresh.querySelector(part)));
  }
  if (focused) {
    const again = document.querySelector(`button[data-retry="${CSS.escape(focused)}"]`);
    if (again) again.focus();
  }
}

setInterval(() => {
  if (!busy()) refresh();
}, 1000 * Number(document.body.dataset.refresh || 10));
