"use strict";
// One task of a rating: answers, by keys too, kept by the browser and saved as a CSV. Without a server.
(() => {
  const MOST_NAMED = 6;  // questions without an answer
  const $ = (id) => document.getElementById(id);
  const { name, head, file } = document.body.dataset;
  const questions = [...document.querySelectorAll(".question")];
  const inputs = (question) => [...question.querySelectorAll("input")];
  const score = (question) => inputs(question).find((input) => input.checked)?.value ?? "";
  const missing = () => questions.filter((question) => score(question) === "");
  let current = 0, hasSaved = false;

  try {  // a browser may keep nothing for pages from the disk
    const kept = JSON.parse(localStorage.getItem(name)) ?? [];
    questions.forEach((question, i) => inputs(question).forEach((input) => { input.checked = input.value === kept[i]; }));
  } catch { }

  function tell() {
    const open = missing().map((question) => question.id.slice(1));
    const which = open.slice(0, MOST_NAMED).join(", ") + (open.length > MOST_NAMED ? ", …" : "");
    const text = open.length ? `${open.length} of ${questions.length} missing: ${which}` : `All ${questions.length} answered`;
    $("state").textContent = text + (hasSaved ? "; saved" : "");
  }

  function go(i) {
    current = Math.max(0, Math.min(i, questions.length - 1));
    const question = questions[current];
    (inputs(question).find((input) => input.checked) ?? inputs(question)[0]).focus({ preventScroll: true });
    question.scrollIntoView({ block: "start", behavior: "instant" });
  }

  function changed() {
    hasSaved = false;
    try { localStorage.setItem(name, JSON.stringify(questions.map(score))); } catch { }
    tell();
  }

  function save() {
    const lines = [head, ...questions.map((question) => `${question.dataset.line},${score(question)}`)];
    const content = "\ufeff" + lines.map((line) => line + "\r\n").join("");  // Excel knows UTF-8 by the mark
    const open = missing().length, link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "text/csv" }));
    link.download = `${file}${open ? `_${open}-missing` : ""}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    hasSaved = true;
    tell();
  }

  $("questions").addEventListener("change", changed);
  $("questions").addEventListener("focusin", (event) => {
    current = questions.indexOf(event.target.closest(".question"));
    questions.forEach((question, i) => question.classList.toggle("current", i === current));
  });
  $("save").addEventListener("click", save);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const input = /^[0-3]$/.test(event.key) && inputs(questions[current])[event.key];
    if (input) {
      input.checked = true;
      changed();
      if (current + 1 < questions.length) go(current + 1);
    } else if (event.key === "n" || event.key === "p") go(current + (event.key === "n" ? 1 : -1));
    else if (event.key === "s") save();
    else return;
    event.preventDefault();
  });
  tell();
})();
