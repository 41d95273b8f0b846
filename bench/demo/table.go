package demo

import (
	"fmt"
	"strings"
)

const (
	// labelWidth is the width of the tables' first column.
	labelWidth = 8
	// mostDifferences is how many differences a step names.
	mostDifferences = 8
)

// cell is one entry of a table: what becomes of the connections between two
// over both families.
type cell struct {
	text   string // "ok", "X", "v4", "v6", or "-" for oneself
	differ bool
}

// table gives a cell for each row and column, by what one witness says.
func table(all []connection, connects func(*connection) bool) [][]cell {
	cells := make([][]cell, len(cast))
	for row := range cells {
		cells[row] = make([]cell, len(targets))
		for column := range targets {
			cells[row][column] = cellOf(all, row, column, connects)
		}
	}
	return cells
}

func cellOf(all []connection, row, column int, connects func(*connection) bool) cell {
	var made []string
	tried, differ := 0, false
	for i := range all {
		c := &all[i]
		if c.row != row || c.column != column {
			continue
		}
		tried++
		differ = differ || c.difference() != ""
		if connects(c) {
			made = append(made, map[bool]string{true: "v4", false: "v6"}[c.dst.Is4()])
		}
	}
	switch {
	case tried == 0:
		return cell{text: "-"}
	case len(made) == 0:
		return cell{"X", differ}
	case len(made) == tried:
		return cell{"ok", differ}
	}
	return cell{made[0], differ}
}

// tables shows what really connects beside what explain says, at most 100
// columns wide.
func (p *printer) tables(all []connection) {
	really := table(all, func(c *connection) bool { return c.reached })
	predicted := table(all, (*connection).allowed)
	width := 0
	for _, t := range targets {
		width += 2 + columnWidth(t)
	}
	p.printf("%*s%-*s |%s\n", labelWidth, "", width, "  what really connects", "  what explain says")
	names, heads := "", ""
	for _, t := range targets {
		names += fmt.Sprintf("  %-*s", columnWidth(t), t.to)
		heads += fmt.Sprintf("  %-*s", columnWidth(t), t.head)
	}
	p.printf("%*s%s |%s\n", labelWidth, "", p.paint(bold, names), p.paint(bold, strings.TrimRight(names, " ")))
	p.printf("%*s%s |%s\n", labelWidth, "", p.paint(dim, heads), p.paint(dim, strings.TrimRight(heads, " ")))
	for row := range cast {
		p.printf("%s%s |%s\n", p.paint(bold, fmt.Sprintf("%-*s", labelWidth, cast[row].name)),
			p.row(really[row], false), p.row(predicted[row], true))
	}
	p.printf("\n")
	p.differences(differences(all))
}

func (p *printer) differences(texts []string) {
	for i, text := range texts {
		if i == mostDifferences {
			p.printf("(and %d more)\n", len(texts)-i)
			break
		}
		p.printf("%s %s\n", p.paint(inverse, "DIFFERENCE"), text)
	}
	if len(texts) > 0 {
		p.printf("\n")
	}
}

func columnWidth(t target) int { return max(len(t.to), len(t.head), 3) }

// row writes a row's cells; the last one of a line isn't padded.
func (p *printer) row(cells []cell, last bool) string {
	var b strings.Builder
	for column, c := range cells {
		text, code := c.text, dim
		switch {
		case c.differ:
			text, code = text+"!", inverse
		case c.text == "X":
			code = red
		case c.text != "-":
			code = green
		}
		pad := columnWidth(targets[column]) - len(text)
		b.WriteString("  " + p.paint(code, text))
		if !last || column < len(cells)-1 {
			b.WriteString(strings.Repeat(" ", pad))
		}
	}
	return b.String()
}
