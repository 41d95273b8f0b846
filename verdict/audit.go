package verdict

// Audit says which decisions the decision log is to have. A later one wants all
// that an earlier one does.
type Audit uint8

// The choices. The zero value leaves it to whoever asks.
const (
	AuditDefault Audit = iota
	AuditNone          // no decision
	AuditDenied        // denials only
	AuditAll           // every decision
)

var auditWords = [...]string{AuditDefault: "", AuditNone: "none", AuditDenied: "denied", AuditAll: "all"}

// String gives the word that ParseAudit reads; it is empty for AuditDefault.
func (a Audit) String() string {
	if int(a) < len(auditWords) {
		return auditWords[a]
	}
	return "unknown"
}

// ParseAudit reads "all", "denied" or "none"; empty is AuditDefault. It is false
// for any other text.
func ParseAudit(text string) (Audit, bool) {
	for a, word := range auditWords {
		if word == text {
			return Audit(a), true
		}
	}
	return AuditDefault, false
}
