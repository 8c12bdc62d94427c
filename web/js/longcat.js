// What the page adds to LongCat's nodes: it hides inputs that another input's choice leaves unused, gives steps and
// guidance their defaults when the mode or the model is changed by hand, and reads the values of workflows that earlier
// versions saved. Choices and values come with the schema (nodes/inputs.py).
import { app } from "../../../scripts/app.js";

const KEY = "longcat";

// How many graphs are being loaded: opening a workflow calls widgets as a hand does, and must change no value.
let loading = 0;

function whileLoading(method) {
  const original = app[method];
  if (typeof original !== "function") return;
  app[method] = async function (...given) {
    loading += 1;
    try {
      return await original.apply(this, given);
    } finally {
      loading -= 1;
    }
  };
}

// The rules of a node's inputs: sets[mode input][choice][input] = {default, most, of: {avatar's version: {default,
// most}}}, onlyFor[input] = {other: choice}, was[input] = {old value: new value}, removed[input] = {count: how many inputs
// before it are gone, saved: how many values a node had with them}.
function rulesOf(definition) {
  const rules = { sets: {}, onlyFor: {}, was: {}, removed: {} };
  for (const group of Object.values(definition.input ?? {}))
    for (const [name, spec] of Object.entries(group ?? {})) {
      const rule = spec?.[1]?.[KEY];
      if (rule?.sets) rules.sets[name] = rule.sets;
      if (rule?.only_for) rules.onlyFor[name] = rule.only_for;
      if (rule?.was) rules.was[name] = rule.was;
      if (rule?.after_removed) rules.removed[name] = rule.after_removed;
    }
  return Object.values(rules).some((kind) => Object.keys(kind).length) ? rules : null;
}

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const isLinked = (node, name) => node.inputs?.some((slot) => slot.widget?.name === name && slot.link != null);

function hide(widget, hidden) {
  const changed = Boolean(widget.hidden) !== hidden;
  widget.hidden = hidden; // the canvas
  if (widget.options) widget.options.hidden = hidden; // Nodes 2.0
  return changed;
}

// Hide what is not used. A linked input stays, and so does everything while a link decides the choice.
function refresh(node, rules) {
  let changed = false;
  for (const [name, others] of Object.entries(rules.onlyFor)) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    const used = Object.entries(others).every(
      ([other, choice]) => isLinked(node, other) || widgetOf(node, other)?.value === choice,
    );
    changed = hide(widget, !used && !isLinked(node, name)) || changed;
  }
  return changed;
}

function fit(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), height]);
  node.setDirtyCanvas?.(true, true);
}

// The file of a node's MODEL: the choice of the loader in front of it, past nodes that take a MODEL themselves.
function fileOf(node) {
  for (let at = node, steps = 0; at && steps < 100; steps += 1) {
    const slot = at.inputs?.find((input) => (input.type === "MODEL" || input.type === "*") && input.link != null);
    if (!slot) return (widgetOf(at, "model_name") ?? widgetOf(at, "unet_name"))?.value ?? "";
    at = at.graph?.getNodeById(at.graph.links.get(slot.link)?.origin_id);
  }
  return "";
}

// Questions to the server that it has not answered yet.
const asked = {};

// The version of the avatar in a file, "" for LongCat-Video; the server reads it off the weights.
async function versionOf(file) {
  if (!file) return "";
  asked[file] ??= app.api
    .fetchApi(`/longcat/model?name=${encodeURIComponent(file)}`)
    .then(async (answer) => (answer.ok ? (await answer.json()).avatar : ""))
    .catch(() => "")
    .finally(() => delete asked[file]);
  return asked[file];
}

const ruleOf = (sets, { choice, version }, name) => sets[choice]?.[name]?.of?.[version] ?? sets[choice]?.[name];

// A value that was the old default, or that does not fit the new mode or model, becomes the new default.
function follow(node, sets, before, after) {
  for (const name of Object.keys(sets[after.choice] ?? {})) {
    const { default: value, most } = ruleOf(sets, after, name);
    const widget = widgetOf(node, name);
    if (!widget || isLinked(node, name)) continue;
    // Where the default is also the most, no other value fits.
    const fits = value === most ? widget.value === value : widget.value <= most;
    if (widget.value !== ruleOf(sets, before, name)?.default && fits) continue;
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  node.setDirtyCanvas?.(true, true);
}

function watch(node, rules) {
  const before = {};
  let version = "";
  const remember = () => {
    for (const name of Object.keys(rules.sets)) before[name] = { choice: widgetOf(node, name)?.value, version };
  };
  // Which model is in front of the node; one that was connected or chosen by hand brings its defaults.
  const look = async () => {
    const quiet = Boolean(loading);
    const found = Object.keys(rules.sets).length ? await versionOf(fileOf(node)) : "";
    if (found === version) return;
    version = found;
    for (const [name, sets] of Object.entries(rules.sets))
      if (!quiet && before[name]) follow(node, sets, before[name], { choice: before[name].choice, version });
    remember();
  };
  const deciding = new Set(Object.keys(rules.sets));
  for (const others of Object.values(rules.onlyFor)) for (const other of Object.keys(others)) deciding.add(other);
  for (const name of deciding) {
    const widget = widgetOf(node, name);
    if (!widget) continue;
    const original = widget.callback;
    widget.callback = function (value, ...rest) {
      const result = original?.call(this, value, ...rest);
      if (!loading && name in rules.sets)
        follow(node, rules.sets[name], before[name], { choice: widget.value, version });
      remember();
      look();
      if (refresh(node, rules) && !loading) fit(node);
      return result;
    };
  }
  return () => {
    remember();
    look();
    return refresh(node, rules);
  };
}

// A loader's other file changes the model of the nodes behind it.
function watchLoader(nodeType) {
  const { onNodeCreated } = nodeType.prototype;
  nodeType.prototype.onNodeCreated = function (...given) {
    const result = onNodeCreated?.apply(this, given);
    const widget = widgetOf(this, "model_name");
    const original = widget?.callback;
    if (!widget) return result;
    widget.callback = function (...values) {
      const changed = original?.apply(this, values);
      if (!loading) for (const node of app.graph?.nodes ?? []) node.longcatSettle?.();
      return changed;
    };
    return result;
  };
}

// The data of a saved node with the values that this version takes. They are saved by position, without names.
function renew(node, data, rules) {
  if (!Array.isArray(data?.widgets_values)) return data;
  const values = [...data.widgets_values];
  const widgets = (node.widgets ?? []).filter((widget) => widget.serialize !== false);
  const names = widgets.map((widget) => widget.name);
  // With inputs that were added since, a node has as many values as before; the last one is of another type.
  for (const [name, { count, saved }] of Object.entries(rules.removed))
    if (values.length === saved && typeof values.at(-1) !== typeof widgets[saved - 1]?.value)
      values.splice(names.indexOf(name), count);
  for (const [name, was] of Object.entries(rules.was)) {
    const at = names.indexOf(name);
    if (typeof values[at] === "boolean") values[at] = was[String(values[at])];
  }
  return { ...data, widgets_values: values };
}

app.registerExtension({
  name: "longcatvideo.Nodes",
  setup() {
    whileLoading("loadGraphData");
    whileLoading("loadApiJson");
  },
  beforeRegisterNodeDef(nodeType, definition) {
    if (definition.name === "LongCatModelLoader") watchLoader(nodeType);
    const rules = rulesOf(definition);
    if (!rules) return;
    const prototype = nodeType.prototype;
    const { configure, onNodeCreated, onAdded, onConfigure, onConnectionsChange } = prototype;
    prototype.configure = function (data) {
      return configure.call(this, renew(this, data, rules));
    };
    prototype.onNodeCreated = function (...given) {
      const result = onNodeCreated?.apply(this, given);
      this.longcatSettle = watch(this, rules);
      if (this.longcatSettle()) fit(this);
      return result;
    };
    prototype.onAdded = function (...given) {
      const result = onAdded?.apply(this, given);
      // Nodes 2.0 keeps what it shows under the node's id, which the node has only now.
      this.longcatSettle?.();
      return result;
    };
    prototype.onConfigure = function (...given) {
      const result = onConfigure?.apply(this, given);
      this.longcatSettle?.();
      return result;
    };
    prototype.onConnectionsChange = function (...given) {
      const result = onConnectionsChange?.apply(this, given);
      this.longcatSettle?.();
      return result;
    };
  },
});
