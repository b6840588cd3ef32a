// What the reader chose outlives the page's reload; a browser may refuse to keep it
const key = "mic " + location.pathname;
const kept = () => { try { return JSON.parse(sessionStorage.getItem(key)) || {}; } catch { return {}; } };
const keep = change => { try { sessionStorage.setItem(key, JSON.stringify({ ...kept(), ...change })); } catch { /* not kept */ } };

// A killed run cannot say so: its page does when it has not been written for long
const tellSilence = () => {
  for (const badge of document.querySelectorAll(".badge.running")) {
    if (Date.now() / 1000 - badge.dataset.written < badge.dataset.patience) continue;
    const since = new Date(badge.dataset.written * 1000);
    badge.textContent = "silent since " + since.toLocaleString("sv").slice(0, 16);
    badge.className = "badge silent";
  }
};
tellSilence();
const isRunning = document.querySelector(".badge.running, .badge.silent") !== null;
if (isRunning) setInterval(() => {
  tellSilence();
  if (!document.hidden && getSelection().isCollapsed) location.reload();
}, 60000);
