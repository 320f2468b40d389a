// What Grafana's types say of a dashboard, for JSON: there an enum is one of its values.

import type { Dashboard as Model, DataQuery, GraphFieldConfig, RowPanel, TableFieldOptions } from "@grafana/schema";
import type { Panel as Any } from "@grafana/schema";
import type * as heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as lines from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

type Json<T> = T extends string
  ? `${T}`
  : T extends number
    ? `${number}` extends `${T}`
      ? number
      : `${T}` extends `${infer N extends number}`
        ? N
        : never
    : T extends readonly (infer U)[]
      ? Json<U>[]
      : T extends object
        ? { [K in keyof T]: Json<T[K]> }
        : T;

// The types of the data source are in no package of their own: these are the fields that the dashboards have.
interface PrometheusQuery extends DataQuery {
  datasource: { type: "prometheus"; uid: "${datasource}" };
  editorMode: "code" | "builder";
  expr: string;
  format: "time_series" | "table" | "heatmap";
  instant: boolean;
  legendFormat: string;
  range: boolean;
}

type Fields = NonNullable<Any["fieldConfig"]>;

interface Of<Type, Options, Custom> extends Omit<Any, "type" | "targets" | "options" | "fieldConfig"> {
  type: Type;
  targets: PrometheusQuery[];
  options: Options;
  fieldConfig: Omit<Fields, "defaults"> & { defaults: Omit<Fields["defaults"], "custom"> & { custom: Custom } };
}

type Panel =
  | RowPanel
  | Of<"heatmap", heatmap.Options, heatmap.FieldConfig>
  | Of<"stat", stat.Options, Record<string, never>>
  | Of<"table", table.Options, Partial<TableFieldOptions>>
  | Of<"timeseries", lines.Options, GraphFieldConfig>;

export type Dashboard = Json<Omit<Model, "panels"> & { panels: Panel[] }>;
