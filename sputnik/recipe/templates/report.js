// Reading needs no script. This one adds a filter by verdict and buttons that open or close all answers of a step.
for (const browser of document.querySelectorAll("[data-browser]")) {
  const bar = browser.querySelector("[data-controls]");
  bar.hidden = false;
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const verdict = button.dataset.verdict;
    for (const other of bar.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
    for (const answer of browser.querySelectorAll("[data-answer]")) {
      answer.hidden = verdict !== "" && answer.dataset.answer !== verdict;
    }
  });
}
