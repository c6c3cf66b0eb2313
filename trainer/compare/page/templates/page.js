"use strict";
// Themes, sorting, searching, pages of galleries, and showing blurred images. The page is whole without it.
(() => {
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // ---- theme: the system's, light, dark
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    try { localStorage.setItem("siftclip-theme", theme); } catch { /* a page of a file may have no storage */ }
  };
  let theme = "auto";
  try { theme = localStorage.getItem("siftclip-theme") ?? "auto"; } catch { /* as above */ }
  setTheme(themes.includes(theme) ? theme : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = root.dataset.theme ?? "auto";
    setTheme(themes[(themes.indexOf(now) + 1) % themes.length]);
  });

  // ---- sorting: the first number of a cell, or its text; what has no value comes last
  const number = (text) => Number.parseFloat(text.replaceAll(",", ""));
  const compare = (first, second, sign) => {
    const [a, b] = [first, second].map((text) => (text === "-" ? NaN : number(text)));
    if (Number.isNaN(a) && Number.isNaN(b)) {
      return (first === "-") - (second === "-") || sign * first.localeCompare(second);
    }
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  };
  const sortBy = (table, head, column) => {
    const descending = head.getAttribute("aria-sort") !== "descending" && (column > 0 || head.hasAttribute("aria-sort"));
    all("th[aria-sort]", table.tHead).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const text = (row) => row.cells[column].textContent.trim();
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(text(a), text(b), descending ? -1 : 1));
    table.tBodies[0].append(...rows);
  };
  for (const table of all("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const sort = document.createElement("button");
      sort.append(...head.childNodes);
      sort.type = "button";
      head.append(sort);
      sort.addEventListener("click", () => sortBy(table, head, column));
    });
  }

  // ---- searching: rows of a table, or samples by their captions
  for (const input of all("input[data-search]")) {
    const place = document.getElementById(input.dataset.search);
    const count = document.getElementById(`${input.dataset.search}-count`);
    const items = all("tbody tr, .gallery > li", place);
    input.parentElement.hidden = false;
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      place.classList.toggle("searched", wanted !== "");
      let shown = 0;
      for (const item of items) {
        item.hidden = !(item.dataset.text ?? item.textContent).toLowerCase().includes(wanted);
        shown += !item.hidden;
      }
      for (const part of all("details", place)) {
        if (wanted && all(".gallery > li:not([hidden])", part).length) part.open = true;
      }
      count.textContent = wanted ? `${shown} of ${items.length} shown` : "";
    });
  }

  // ---- galleries page through their samples; a search looks at all of them
  const perPage = 12;
  for (const gallery of all(".gallery")) {
    const items = [...gallery.children];
    if (items.length <= perPage) continue;
    const bar = document.createElement("div");
    const place = document.createElement("span");
    const title = gallery.closest("details").querySelector("summary").textContent.trim();
    let first = 0;
    const show = (start) => {
      first = start;
      const end = Math.min(first + perPage, items.length);
      items.forEach((item, at) => item.classList.toggle("off", at < first || at >= end));
      place.textContent = `${first + 1} to ${end} of ${items.length}`;
      back.setAttribute("aria-disabled", String(first === 0));
      next.setAttribute("aria-disabled", String(end === items.length));
    };
    const [back, next] = [["Previous", -perPage], ["Next", perPage]].map(([text, step]) => {
      const turn = document.createElement("button");
      turn.type = "button";
      turn.className = "tool";
      turn.textContent = text;
      turn.addEventListener("click", () => {
        if (turn.getAttribute("aria-disabled") === "false") show(first + step);
      });
      return turn;
    });
    bar.className = "pages";
    bar.setAttribute("role", "group");
    bar.setAttribute("aria-label", `Pages of ${title}`);
    place.className = "note";
    place.setAttribute("role", "status");
    bar.append(back, place, next);
    gallery.before(bar);
    show(0);
  }

  // ---- images are blurred until somebody wants to see them
  for (const thumb of all(".thumb")) {
    thumb.addEventListener("click", () => {
      thumb.setAttribute("aria-pressed", String(thumb.classList.toggle("seen")));
    });
  }
  const reveal = document.getElementById("reveal");
  reveal?.addEventListener("click", () => {
    const seen = document.getElementById("samples").classList.toggle("unblurred");
    reveal.setAttribute("aria-pressed", String(seen));
    reveal.textContent = seen ? "Blur the images" : "Show the images";
  });
})();
