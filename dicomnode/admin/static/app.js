"use strict";
// Retry buttons. The header cannot be sent by a page of another origin, see admin/guard.py.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-retry]");
  if (!button) return;
  button.disabled = true;
  const answer = await fetch(button.dataset.retry, { method: "POST", headers: { "X-Dicomnode": "1" } });
  if (answer.ok) {
    location.reload();
    return;
  }
  const body = await answer.json().catch(() => ({}));
  button.title = (body.error && `${body.error.cause} ${body.error.hint}`) || String(answer.status);
  button.classList.add("bad");
});
