// What every page has: the theme, shortcuts, copying, sortable tables, LaTeX, and how a page asks the server.
"use strict";

const dx = {
  root: document.body.dataset.root,
  token: document.querySelector("meta[name=dx-token]")?.content ?? "",

  data() {
    return JSON.parse(document.getElementById("data").textContent);
  },

  /** An element with attributes and children; text is never read as HTML. */
  make(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((c) => c !== null && c !== undefined));
    return made;
  },

  say(words) {
    document.getElementById("said").textContent = words;
  },

  async ask(path) {
    const answer = await fetch(dx.root + path, { headers: { Accept: "application/json" } });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  },

  async send(path, value) {
    const answer = await fetch(dx.root + path, {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Deltax-Token": dx.token },
      body: JSON.stringify(value),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  },

  /** Draw the LaTeX inside an element. `trust` is off: no addresses, no pictures, no HTML of its own. */
  math(inside) {
    if (!window.katex) return;
    for (const place of inside.querySelectorAll(".math:not([data-tex])")) {
      const tex = place.textContent;
      place.dataset.tex = tex;
      try {
        katex.render(tex, place, {
          displayMode: place.classList.contains("display"),
          throwOnError: false, trust: false, strict: "ignore", maxSize: 20, maxExpand: 500,
        });
      } catch {
        place.textContent = tex;
      }
    }
  },

  later(wait, call) {
    let timer;
    return (...args) => {
      clearTimeout(timer);
      timer = setTimeout(() => call(...args), wait);
    };
  },

  /** 1234567 -> "1.23M", as the pages' own filter does. */
  number(value, digits = 3) {
    for (const [size, letter] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= size) return Number((value / size).toPrecision(digits)) + letter;
    }
    return String(Number(value.toPrecision(digits)));
  },
};

document.getElementById("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try { localStorage.setItem("dx-theme", next); } catch { /* it lasts for this page */ }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/input|select|textarea/i.test(event.target.tagName) && !event.ctrlKey && !event.metaKey) {
    const search = document.getElementById("search");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  }
});

document.addEventListener("submit", (event) => event.preventDefault());

document.addEventListener("click", async (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  try {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "copied";
  } catch {
    button.textContent = "select it";
  }
});

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = dx.make("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const numbers = !isNaN(parseFloat(x)) && !isNaN(parseFloat(y));
        return (down ? -1 : 1) * (numbers ? parseFloat(x) - parseFloat(y) : x.localeCompare(y));
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}

dx.math(document);
