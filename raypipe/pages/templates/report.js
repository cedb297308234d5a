"use strict";
// The gallery: views, filters, order, keys. All texts come from attributes of the page and go in as text, never as HTML.
(() => {
  const VIEWS = ["overlay", "contour", "mask", "original"];
  const $ = (id) => document.getElementById(id);
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
    });
  }
  $("explain")?.addEventListener("click", () => { $("words").open = true; });
  const list = $("cards");
  if (!list) return;

  const cards = [...list.children].map((element, index) => ({
    element,
    index,
    open: element.querySelector(".open"),
    flip: element.querySelector(".flip"),
    name: element.dataset.name,
    folded: [element.dataset.name, ...[...element.querySelectorAll(".label")].map((label) => label.textContent)].join("\n").toLowerCase(),
    id: element.dataset.id,
    oddness: Number(element.dataset.oddness),
    parts: element.dataset.part.split(" "),
    figures: JSON.parse(element.dataset.figures),
    notes: [...element.querySelectorAll(".note")].map((note) => note.textContent),
  }));
  const buttons = (selector) => [...document.querySelectorAll(selector)];
  const viewButtons = buttons("#toolbar [data-view]");
  const partButtons = buttons("#toolbar [data-part]");
  const ranges = buttons("#filters [data-figure]");
  const viewer = $("viewer");
  const viewerButtons = buttons("#viewer [data-view]");
  let view = "overlay", part = "", visible = cards, current = cards[0], shown = null;

  for (const { element } of cards) {  // the original and the truth are in the page once and shown in every pane
    for (const layer of [".original", ".frame .truth:is(img)"]) {
      const images = [...element.querySelectorAll(layer)], source = images.find((image) => image.hasAttribute("src"))?.src;
      if (source) images.forEach((image) => { image.src = source; });
    }
  }

  const press = (group, pressed) => group.forEach((b) => b.setAttribute("aria-pressed", String(b === pressed)));

  function setView(card, name) {
    card.element.dataset.view = name;
    card.flip.textContent = name[0].toUpperCase() + name.slice(1);
    if (shown === card) {
      $("viewer-picture").dataset.view = name;
      press(viewerButtons, viewerButtons.find((b) => b.dataset.view === name));
    }
  }

  function setAllViews(name) {
    view = name;
    press(viewButtons, viewButtons.find((b) => b.dataset.view === name));
    cards.forEach((card) => setView(card, name));
  }

  const truthButtons = buttons(".truths");
  function switchTruth() {
    const isOff = document.body.classList.toggle("no-truth");
    truthButtons.forEach((b) => b.setAttribute("aria-pressed", String(!isOff)));
  }

  const nextView = (card) => setView(card, VIEWS[(VIEWS.indexOf(card.element.dataset.view) + 1) % VIEWS.length]);
  const figure = (card, name) => {
    const value = card.figures[Number($("run")?.value ?? 0)]?.[name];
    return value == null ? null : name === "share" ? 100 * value : value;
  };

  function inRanges(card) {
    return ranges.every((input) => {
      if (input.value === "") return true;
      const value = figure(card, input.dataset.figure);
      return value !== null && (input.dataset.end === "low" ? value >= Number(input.value) : value <= Number(input.value));
    });
  }

  function hasNote(card) {
    const wanted = $("note")?.value ?? "";
    if (wanted === "") return true;
    return wanted === "-" ? !card.notes.length : card.notes.includes(wanted.slice(1));
  }

  function order(by) {
    const texts = (one, other) => (one < other ? -1 : Number(one > other));
    if (by === "oddness") return (a, b) => a.index - b.index;
    if (by === "id" || by === "name") return (a, b) => texts(a[by], b[by]);
    const sign = by.startsWith("-") ? -1 : 1, name = by.replace("-", "");
    return (a, b) => {  // images without the figure come last
      const x = figure(a, name), y = figure(b, name);
      return x === null || y === null ? (x === null) - (y === null) : sign * (x - y) || a.index - b.index;
    };
  }

  function update() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (card) => (!part || card.parts.includes(part)) && words.every((w) => card.folded.includes(w)) && hasNote(card) && inRanges(card);
    visible = cards.filter(matches).sort(order($("sort").value));
    const kept = new Set(visible);
    cards.forEach((card) => { card.element.hidden = !kept.has(card); });
    list.append(...visible.map((card) => card.element));
    $("count").textContent = `${visible.length} of ${cards.length}`;
    $("nothing").hidden = visible.length > 0;
    const active = ranges.filter((input) => input.value !== "").length + Number(Boolean($("note")?.value));
    $("active").textContent = active ? ` (${active})` : "";
    if (!kept.has(current)) current = visible[0];
    rove();
  }

  function rove() {  // one stop of the Tab key for the whole gallery; arrows move inside
    for (const card of cards) {
      card.open.tabIndex = card.flip.tabIndex = card === current ? 0 : -1;
    }
  }

  function reset() {
    ranges.forEach((input) => { input.value = ""; });
    if ($("note")) $("note").value = "";
    $("search").value = "";
    setPart("");
  }

  function setPart(name) {
    part = name;
    press(partButtons, partButtons.find((b) => b.dataset.part === name));
    update();
  }

  function columns() {
    const top = visible[0].element.offsetTop;
    const second = visible.findIndex((card) => card.element.offsetTop > top);
    return second === -1 ? visible.length : second;
  }

  function move(card, step) {
    const target = visible[visible.indexOf(card) + step];
    if (!target) return null;
    current = target;
    rove();
    return target;
  }

  const STEPS = {
    ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: () => -columns(), ArrowDown: () => columns(),
    Home: (card) => -visible.indexOf(card), End: (card) => visible.length - 1 - visible.indexOf(card),
  };

  for (const card of cards) {
    card.open.addEventListener("click", () => enlarge(card));
    card.flip.addEventListener("click", () => nextView(card));
    card.element.addEventListener("focusin", () => { if (current !== card) { current = card; rove(); } });
    card.element.addEventListener("keydown", (event) => {
      if (event.key in STEPS && !event.altKey && !event.ctrlKey && !event.metaKey) {
        const target = move(card, STEPS[event.key](card));
        if (target) { event.preventDefault(); target.open.focus(); }  // else the page scrolls
        event.stopPropagation();
      } else if (event.key === "v") nextView(card);
    });
  }

  function enlarge(card) {
    shown = card;
    $("viewer-name").textContent = card.name;
    $("viewer-picture").replaceChildren(card.element.querySelector(".panes").cloneNode(true));
    const details = card.element.querySelector(".details").cloneNode(true);
    $("viewer-details").replaceChildren(card.element.querySelector(".chips").cloneNode(true), ...details.children);
    $("previous").disabled = visible[0] === card;
    $("next").disabled = visible.at(-1) === card;
    setView(card, card.element.dataset.view);
    if (!viewer.open) viewer.showModal();
  }

  function turn(step) {
    const target = move(shown, step);
    if (target) enlarge(target);
  }

  viewer.addEventListener("close", () => { const card = shown; shown = null; card?.open.focus(); });
  viewer.addEventListener("click", (event) => {
    if (event.target.closest("a")) shown = null;  // the link says where to go
    if (event.target === viewer || !shown) viewer.close();
  });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
    if (event.key === "v") nextView(shown);
    if (event.key === "t" && truthButtons.length) switchTruth();
    if (VIEWS[event.key - 1]) setView(shown, VIEWS[event.key - 1]);
  });
  $("close").addEventListener("click", () => viewer.close());
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  viewerButtons.forEach((b) => b.addEventListener("click", () => setView(shown, b.dataset.view)));

  truthButtons.forEach((b) => b.addEventListener("click", switchTruth));
  viewButtons.forEach((b) => b.addEventListener("click", () => setAllViews(b.dataset.view)));
  partButtons.forEach((b) => b.addEventListener("click", () => setPart(b.dataset.part)));
  for (const input of [...ranges, $("search")]) input.addEventListener("input", update);
  for (const select of [$("sort"), $("note"), $("run")]) select?.addEventListener("change", update);
  $("opacity").addEventListener("input", () => {
    document.documentElement.style.setProperty("--opacity", $("opacity").value / 100);
  });
  $("reset").addEventListener("click", reset);
  $("reset-too").addEventListener("click", reset);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && $("filters").open) {
      $("filters").open = false;
      $("filters").querySelector("summary").focus();
    }
    if (typing || viewer.open || event.altKey || event.ctrlKey || event.metaKey) return;
    if (VIEWS[event.key - 1]) setAllViews(VIEWS[event.key - 1]);
    if (event.key === "t" && truthButtons.length) switchTruth();
    if (event.key === "/") { event.preventDefault(); $("search").focus(); }
    // Nothing has the focus, as after loading: the arrows go into the gallery, Enter opens its current image.
    if (document.activeElement !== document.body || !visible.length) return;
    if (["ArrowLeft", "ArrowRight", "ArrowDown"].includes(event.key)) { event.preventDefault(); current.open.focus(); }
    if (event.key === "Enter") { event.preventDefault(); enlarge(current); }
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#filters")) $("filters").open = false;
  });
  $("toolbar").hidden = false;
  update();
})();
