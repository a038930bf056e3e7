// Package access decides who may do what to a lock. It is pure: everything it
// needs is passed in, and it knows neither credentials nor storage.
package access

import (
	"slices"
	"strings"
)

// Scope is what a credential of an organisation was given for.
type Scope string

// The scopes of an organisation's keys and service tokens.
const (
	OpenLocks   Scope = "locks:open"
	ReadLocks   Scope = "locks:read"
	ManageLocks Scope = "locks:manage" // create, owner, organisation, keys
)

// Scopes is every scope there is, in the order in which they are shown.
var Scopes = []Scope{OpenLocks, ReadLocks, ManageLocks}

// Action is what somebody wants to do to a lock that exists.
type Action int

// The actions that rights are asked for.
const (
	Open   Action = iota
	Look          // who and what the lock is
	Audit         // everything in it and all that happened
	Manage        // change owner, organisation or keys
)

// Subject is whose rights are used. One of User, Org and Super is set.
type Subject struct {
	User   string // a B2C user's UUID
	Org    string // an organisation, with Scopes
	Scopes []Scope
	Super  bool // the operator of the deployment
}

// Lock is what access needs to know of a lock.
type Lock struct {
	Owner string   // user UUID, "" for none
	Org   string   // "" for none
	Keys  []Holder // keys that are held by a user
}

// Holder is a user who holds a key.
type Holder struct{ Key, User string }

// Right is the ground on which an action is allowed, as it is recorded:
// "owner:<user>", "org:<id>", "key:<uuid>@<user>" or "super". A right stands as
// long as what it names does.
type Right string

const super Right = "super"

// May answers with the right that allows the action. ok is false when there is
// none.
func May(s Subject, a Action, l Lock) (r Right, ok bool) {
	switch {
	case s.Super:
		return super, true
	case s.Org != "":
		return Right("org:" + s.Org), s.Org == l.Org && s.has(a)
	case s.User != "" && s.User == l.Owner:
		return Right("owner:" + s.User), true
	case s.User != "" && (a == Open || a == Look):
		return heldKey(s.User, l)
	}
	return "", false
}

func heldKey(user string, l Lock) (Right, bool) {
	i := slices.IndexFunc(l.Keys, func(h Holder) bool { return h.User == user })
	if i < 0 {
		return "", false
	}
	return Right("key:" + l.Keys[i].Key + "@" + user), true
}

func (s Subject) has(a Action) bool {
	return slices.Contains(s.Scopes, map[Action]Scope{
		Open: OpenLocks, Look: ReadLocks, Audit: ReadLocks, Manage: ManageLocks,
	}[a])
}

// MayCreate says whether the subject may create locks.
func MayCreate(s Subject) bool {
	return s.Super || s.User != "" || s.Org != "" && s.has(Manage)
}

// Stands says whether a right that was granted still holds on the lock.
func Stands(r Right, l Lock) bool {
	kind, what, _ := strings.Cut(string(r), ":")
	switch kind {
	case "super":
		return true
	case "owner":
		return what == l.Owner
	case "org":
		return what == l.Org
	case "key":
		return slices.ContainsFunc(l.Keys, func(h Holder) bool { return what == h.Key+"@"+h.User })
	}
	return false
}
