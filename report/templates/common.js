// Remember the reader's choices when the page reloads, if the browser allows it
const key = "mic " + location.pathname;
const choices = () => { try { return JSON.parse(sessionStorage.getItem(key)) || {}; } catch { return {}; } };
const remember = change => { try { sessionStorage.setItem(key, JSON.stringify({ ...choices(), ...change })); } catch { /* not allowed */ } };

// A killed run cannot report its end, so show a run as silent if its page has not been written for long
const markSilent = () => {
  for (const badge of document.querySelectorAll(".badge.running")) {
    if (Date.now() / 1000 - badge.dataset.written < badge.dataset.patience) continue;
    const since = new Date(badge.dataset.written * 1000);
    badge.textContent = "silent since " + since.toLocaleString("sv").slice(0, 16);
    badge.className = "badge silent";
  }
};
markSilent();
const isRunning = document.querySelector(".badge.running, .badge.silent") !== null;
if (isRunning) setInterval(() => {
  markSilent();
  if (!document.hidden && getSelection().isCollapsed) location.reload();
}, 60000);
