// Renews the live part of a page as the server sends it, and shows times in the reader's zone. Pages work without it.
"use strict";
(() => {
  const region = document.querySelector("[data-live]");
  const bar = document.querySelector("[data-liveness]");

  // Times

  const zone = new Intl.DateTimeFormat(undefined, {
    year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit",
    hour12: false, timeZoneName: "short",
  });

  function localize(root) {
    for (const button of root.querySelectorAll("[data-copy]")) button.hidden = false;
    for (const time of root.querySelectorAll("time[datetime]")) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      const part = Object.fromEntries(zone.formatToParts(at).map(({ type, value }) => [type, value]));
      time.title = time.textContent;
      time.textContent =
        `${part.year}-${part.month}-${part.day} ${part.hour}:${part.minute}:${part.second} ${part.timeZoneName}`;
    }
  }

  // Copying. Where there is no clipboard, as without TLS, it is marked for the keys.

  document.addEventListener("click", async ({ target }) => {
    const from = target.dataset?.copy && document.getElementById(target.dataset.copy);
    if (!from) return;
    getSelection().selectAllChildren(from);
    await navigator.clipboard?.writeText(from.textContent);
    target.textContent = navigator.clipboard ? "Copied" : "Marked";
  });

  // Renewal: what is the same stays, and with it the focus, a selection, and what somebody is writing.

  function renewAttributes(old, fresh) {
    for (const { name } of [...old.attributes]) {
      // What a reader has opened stays open.
      if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
  }

  // Not its property `id`, which is a control of that name where a form has one.
  function idOf(node) {
    return node.getAttribute?.("id") ?? "";
  }

  function isSame(old, fresh) {
    return old.nodeName === fresh.nodeName && idOf(old) === idOf(fresh)
      && old.getAttribute?.("action") === fresh.getAttribute?.("action");
  }

  // The old node that a fresh one renews: the next one, or with an id a later one.
  function twinOf(fresh, next) {
    if (next === null || isSame(next, fresh) || !idOf(fresh)) return next !== null && isSame(next, fresh) ? next : null;
    return twinOf(fresh, next.nextSibling);
  }

  function renew(old, fresh) {
    let next = old.firstChild;
    for (const node of [...fresh.childNodes]) {
      const twin = twinOf(node, next);
      if (twin === null) {
        old.insertBefore(node, next);
        continue;
      }
      while (next !== twin) next = removed(next);
      if (node.nodeType === Node.ELEMENT_NODE) {
        renewAttributes(twin, node);
        renew(twin, node);
      } else if (twin.nodeValue !== node.nodeValue) {
        twin.nodeValue = node.nodeValue;
      }
      next = twin.nextSibling;
    }
    while (next !== null) next = removed(next);
  }

  function removed(node) {
    const next = node.nextSibling;
    node.remove();
    return next;
  }

  // The stream: open while somebody can see the page, and has not paused it.

  let stream = null;
  let paused = false;

  function tell(words, state) {
    bar.hidden = false;
    bar.dataset.state = state;
    const line = bar.querySelector("[data-liveness-words]");
    if (line.textContent !== words) line.textContent = words;
    bar.querySelector("button").textContent = paused ? "Go on" : "Pause";
  }

  function close() {
    stream?.close();
    stream = null;
  }

  function open() {
    if (stream !== null || paused || document.hidden) return;
    const opened = new EventSource(region.dataset.live);
    stream = opened;
    opened.onmessage = ({ data }) => {
      const fresh = new DOMParser().parseFromString(`<div>${data}</div>`, "text/html").body.firstChild;
      localize(fresh);
      renew(region, fresh);
      tell("Live", "live");
    };
    opened.onerror = () => {
      tell("The console does not answer; trying again", "lost");
      if (opened.readyState !== EventSource.CLOSED) return;
      // It has refused: the login has ended, or too many look.
      close();
      setTimeout(refused, 5000);
    };
  }

  async function refused() {
    try {
      const answer = await fetch(region.dataset.live, { method: "HEAD" });
      if (answer.status === 401) location.reload();
    } catch {
      // It does not answer.
    }
    open();
  }

  localize(document);
  if (region === null || bar === null) return;
  bar.querySelector("button").addEventListener("click", () => {
    paused = !paused;
    if (paused) {
      close();
      tell("Paused", "paused");
    } else {
      open();
    }
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
})();
