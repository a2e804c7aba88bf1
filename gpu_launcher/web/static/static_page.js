// What a static page does: it sorts, filters and pages its table, and shows its charts. See web/static_page.py.
"use strict";

/** An element. Texts in it are not read as HTML. */
const make = (tag, attributes, ...content) => {
  const element = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  element.append(...content);
  return element;
};

const unpacked = () => {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (one) => one.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};

const showTable = (data) => {
  const form = document.getElementById("filter");
  const jobs = document.getElementById("jobs");
  const columns = new Map(data.columns.map((column) => [column.name, column]));
  const total = columns.get("number").cells.length;
  let query;

  const cut = (column, row) => [column.texts[column.cells[row]]].flat()[0];
  const whole = (column, row) => [column.texts[column.cells[row]]].flat().at(-1);
  const number = (row) => whole(columns.get("number"), row);
  let searched;
  const textOf = (row) => {
    searched ??= Array.from({ length: total }, (_, one) => [
      data.common,
      ...data.columns.filter(({ prefix }) => prefix !== null).map((column) => column.prefix + whole(column, one)),
    ].join(" ").toLowerCase());
    return searched[row];
  };

  // The address
  const usual = (changes) => ({ sort: "", state: "", text: "", columns: [], page: 1, ...changes });
  const read = () => {
    const found = new URLSearchParams(location.hash.slice(1));
    const [sort, state, text] = ["sort", "state", "text"].map((name) => found.get(name) ?? "");
    const known = found.getAll("column").filter((name) => columns.has(name));
    return { sort, state, text, columns: known, page: Number(found.get("page")) || 1 };
  };
  const address = (changes) => {
    const { columns: shown, page, ...rest } = { ...query, ...changes };
    const pairs = [...Object.entries(rest), ...shown.map((name) => ["column", name]), ["page", page > 1 ? page : ""]];
    return `#?${new URLSearchParams(pairs.filter(([, value]) => value))}`;
  };

  // The jobs that are found, in order. What is missing comes last.
  const found = () => {
    const words = query.text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...Array(total).keys()].filter((row) =>
      (!query.state || whole(columns.get("outcome"), row) === query.state) &&
      (!words.length || words.every((word) => textOf(row).includes(word))));
    const falls = query.sort.startsWith("-") && !columns.has(query.sort);
    const by = columns.get(falls ? query.sort.slice(1) : query.sort);
    if (!by) return rows;
    const place = (row) => (by.cells[row] < by.ranked ? by.cells[row] * (falls ? -1 : 1) : Infinity);
    return rows.sort((one, other) => {
      const [first, second] = [place(one), place(other)];
      return first === second ? 0 : first - second;
    });
  };

  // As templates/_sweep.html does it
  const headOf = (column) => {
    const rises = query.sort === column.name || (column.name === "number" && !query.sort);
    const falls = query.sort === `-${column.name}`;
    const href = address({ sort: rises ? `-${column.name}` : column.name, page: 1 });
    const order = rises ? "ascending" : falls ? "descending" : "none";
    const arrow = make("span", { "aria-hidden": "true" }, { ascending: " ↑", descending: " ↓", none: "" }[order]);
    const link = make("a", { href, "data-key": `sort ${column.name}` }, column.title, arrow);
    return make("th", { scope: "col", "aria-sort": order, class: column.number ? "number" : "" }, link);
  };
  const cellOf = (column, row, isOpen) => {
    const [text, all] = [cut(column, row), whole(column, row)];
    if (column.name === "number") {
      const about = { "aria-label": `job ${text}`, "aria-expanded": isOpen, "data-key": `job ${text}` };
      const link = make("a", { href: isOpen ? address({}) : `#job-${text}`, role: "button", ...about }, text);
      return make("th", { scope: "row", class: "number" }, link);
    }
    if (column.name === "outcome") return make("td", {}, make("span", { class: `state ${text}` }, text));
    return make("td", { ...(column.number && { class: "number" }), ...(text !== all && { title: all }) }, text);
  };
  const detailsOf = (row, width) => {
    const facts = data.columns.filter((column) => column.name !== "number" && whole(column, row)).map((column) =>
      make("div", {}, make("dt", {}, column.title), make("dd", {}, whole(column, row))));
    return make("tr", { class: "details" }, make("td", { colspan: width }, make("dl", { class: "facts" }, ...facts)));
  };

  const show = (job) => {
    const rows = found();
    if (job !== undefined) query.page = Math.floor(rows.indexOf(job) / data.rows) + 1;
    const pages = Math.max(1, Math.ceil(rows.length / data.rows));
    query.page = Math.min(Math.max(1, query.page), pages);
    const names = query.columns.length ? query.columns : data.usual;
    const shown = ["number", ...names].map((name) => columns.get(name));

    form.elements.text.value = query.text;
    form.elements.state.value = query.state;
    form.querySelectorAll("[name=column]").forEach((box) => { box.checked = names.includes(box.value); });

    const counted = `${rows.length} ${rows.length === 1 ? "job" : "jobs"}`;
    const of = rows.length === total ? "" : ` of ${total}`;
    const where = pages > 1 ? `page ${query.page} of ${pages}` : "";
    const parts = [make("p", { class: "note" }, counted, of, where && `, ${where}`)];
    if (rows.length) {
      const body = rows.slice((query.page - 1) * data.rows, query.page * data.rows).flatMap((row) => {
        const line = make("tr", { id: `job-${number(row)}` }, ...shown.map((column) => cellOf(column, row, row === job)));
        return row === job ? [line, detailsOf(row, shown.length)] : [line];
      });
      const head = make("thead", {}, make("tr", {}, ...shown.map(headOf)));
      const table = make("table", { class: "jobs" }, head, make("tbody", {}, ...body));
      parts.push(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": "jobs-title" }, table));
    } else {
      parts.push(make("p", {}, "No job matches."));
    }
    if (pages > 1) {
      const to = (page, rel, text) => make("a", { rel, href: address({ page }), "data-key": rel }, text);
      parts.push(make("nav", { class: "pages", "aria-label": "Pages of jobs" },
        ...(query.page > 1 ? [to(query.page - 1, "prev", "‹ Previous")] : []),
        make("span", {}, where),
        ...(query.page < pages ? [to(query.page + 1, "next", "Next ›")] : [])));
    }
    const key = jobs.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    const left = jobs.querySelector(".scroll")?.scrollLeft ?? 0;
    jobs.replaceChildren(...parts);
    const region = jobs.querySelector(".scroll");
    if (region) region.scrollLeft = left;
    if (key) (jobs.querySelector(`[data-key="${CSS.escape(key)}"]`) ?? region)?.focus({ preventScroll: true });
  };

  const follow = () => {
    const job = /^#job-(\d+)$/.exec(location.hash);
    const row = job ? [...Array(total).keys()].find((one) => number(one) === job[1]) : undefined;
    if (row !== undefined) {
      query ??= usual({ sort: data.sort });
      if (!found().includes(row)) query = usual({ sort: query.sort, columns: query.columns });
      show(row);
      document.querySelector(`#job-${job[1]} a`).focus();
    } else if (location.hash.startsWith("#?")) {
      query = read();
      show();
    } else if (!query || !location.hash) { // other places in the page change nothing
      query = usual({ sort: data.sort });
      show();
    }
  };
  const choose = () => {
    const boxes = [...form.querySelectorAll("[name=column]")];
    const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
    const text = form.elements.text.value;
    const isUsual = chosen.join("\n") === data.usual.join("\n");
    query = usual({ sort: query.sort, state: form.elements.state.value, text, columns: isUsual ? [] : chosen });
    history.replaceState(null, "", address({}));
    show();
  };
  addEventListener("hashchange", follow);
  form.addEventListener("input", choose);
  form.addEventListener("submit", (event) => event.preventDefault());
  follow();
};

const showCharts = ({ charts, reports }) => {
  if (reports.length) chartsIn(document.querySelector("#reports .charts"))(reports, true);
  const area = document.getElementById("charts");
  if (!area) return;
  const value = document.getElementById("value");
  const show = chartsIn(area);
  value.addEventListener("change", () => show(charts[value.value], true));
  show(charts[value.value], true);
};

unpacked().then((data) => {
  showTable(data);
  showCharts(data);
});
